"""Models that register themselves in RecBole, one file each."""

from recbole_cce.models import sasrec, cooccurrence  # noqa: F401, I001  in the order of every list of them
