"""Models that register themselves in RecBole, one file each."""

from recbole_cce import arrival

arrival.require()  # with RecBole come its repairs, before what is here

from recbole_cce.models import sasrec, cooccurrence  # noqa: E402, F401, I001  in the order of every list of them
