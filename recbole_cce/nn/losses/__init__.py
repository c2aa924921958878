"""The training losses, one nn.Module per `loss_type`: forward(hidden [N, D], target [N], weight [V+1, D]) -> LossSum.

 CE and CE- hold all their logits, in plain
torch; the others call an op, which `loss_backend` concerns.
"""
