"""What a model is made of.

Who imports a layer imports megatron-core, a plugin's file perhaps before this process has its platform. Its notices are
silenced here, before it is there to make them.
"""

import torch

from megatron_mm.platform import notices

notices.silence(notices.ALWAYS)
if not torch.cuda.is_available():
    notices.silence(notices.WITHOUT_CUDA)
