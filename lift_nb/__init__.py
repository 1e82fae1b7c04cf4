__version__ = "0.1.0"

import os, warnings

warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated') # of open_clip's import; nothing a user can change
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # threads of PyTorch that wait leave the core to others; read when torch is imported
