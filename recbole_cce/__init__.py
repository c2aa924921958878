"""recbole-cce: SASRec with memory-efficient softmax losses (CCE, CCE-, SCE) as a plugin of RecBole 1.2.1.

Importing the package makes RecBole run on current NumPy, pandas, torch and Python and registers SASRecCCE and
SASRecSCE. It makes no CUDA call: RecBole's Config sets CUDA_VISIBLE_DEVICES later.
"""

from recbole_cce.plugin import repairs

repairs.apply()

from recbole_cce.plugin import config_checks, entry_points, registration, saved_data  # noqa: E402  RecBole can be imported only after the repairs

__version__ = "0.1.0"

register_model = registration.register_model
registration.install()
config_checks.install()
saved_data.install()
entry_points.install()

from recbole_cce import models  # noqa: E402, F401  they register themselves

__all__ = ["__version__", "register_model"]
