"""Every Python that has this folder in PYTHONPATH starts as on a machine with a GPU; see pretended_cuda.py."""

import pretended_cuda

pretended_cuda.install()
