"Benchmarks of a training step and of everything around it"
from lift_nb.bench.steps import saved_bytes, step_setup

__all__ = ['saved_bytes', 'step_setup']
