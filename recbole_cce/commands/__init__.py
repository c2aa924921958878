"""What the command line does, a file for each command."""

from recbole_cce import arrival

arrival.require()  # with RecBole come its repairs, before what is here
