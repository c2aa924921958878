"""recbole-cce: SASRec with memory-efficient softmax losses (CCE, CCE-, SCE) as a plugin of RecBole 1.2.1.

Once the package is imported, RecBole runs on current NumPy, pandas, torch and Python and knows SASRecCCE and SASRecSCE:
that is done when RecBole itself is imported, before any of its modules runs. The folders `ops`, `nn`, `optim` and
`distributed` need no RecBole. Nothing makes a CUDA call: RecBole's Config sets CUDA_VISIBLE_DEVICES later.
"""

from typing import Any

from recbole_cce import arrival

__version__ = "0.1.0"
__all__ = ["__version__", "register_loss", "register_model"]


def __getattr__(name: str) -> Any:
    if name == "register_loss":
        from recbole_cce.nn.losses import register_loss

        return register_loss
    if name == "register_model":
        from recbole_cce.plugin.registration import register_model

        return register_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _repair_and_register() -> None:
    from recbole_cce.plugin import repairs

    repairs.apply()
    from recbole_cce.plugin import config_checks, entry_points, registration, saved_data

    for part in (registration, config_checks, saved_data, entry_points):
        part.install()
    from recbole_cce import models  # noqa: F401  they register themselves


arrival.follow(_repair_and_register)
