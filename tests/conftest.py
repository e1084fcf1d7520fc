"""One thread and oneDNN's default kernels: both are part of the arithmetic, and workers choose for themselves."""
import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
os.environ.pop("ONEDNN_MAX_CPU_ISA", None)  # before torch computes anything
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others sleep; no bit depends on it

import torch  # noqa: E402

torch.set_num_threads(1)
