"""One thread everywhere: the number of threads is part of the arithmetic, and worker processes have one."""
import torch

torch.set_num_threads(1)
