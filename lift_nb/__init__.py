__version__ = "0.1.0"

import warnings

warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated') # of open_clip's import; nothing a user can change
