"""recbole-cce: SASRec with memory-efficient softmax losses (CCE, CCE-, SCE) as a plugin of RecBole 1.2.1.

Importing the package makes RecBole run on current NumPy, pandas, torch and Python and registers SASRecCCE and
SASRecSCE. It makes no CUDA call: RecBole's Config sets CUDA_VISIBLE_DEVICES later.
"""

from recbole_cce import compat

compat.apply()

from recbole_cce import (  # noqa: E402  RecBole can be imported only after the repairs
    checks,
    quick_start,
    registry,
    saved_data,
)

__version__ = "0.1.0"

register_model = registry.register_model
registry.register_builtin()
checks.install()
saved_data.install()
quick_start.install()

__all__ = ["__version__", "register_model"]
