"""Operations on single rows, each in one launch: norms, activations, the embedding, the cap of logits.

Between two linears of a layer lies one launch: ``norm`` adds the last one's output to the residual stream and
norms the sum, ``gated`` makes one row of the two that gate and up gave, ``activated`` of one where there is no
gate.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.rows.launch import Activation, activated, embed, gated, norm, softcap

__all__ = ["Activation", "activated", "embed", "gated", "norm", "softcap"]
