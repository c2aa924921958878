"""All that this package knows of RecBole's inside: repairs, registration, keys, entry points."""

from recbole_cce import arrival

arrival.require()  # with RecBole come its repairs, before what is here
