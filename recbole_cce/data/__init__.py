"""From the files of a data set to the rows and lists of a batch."""

from recbole_cce import arrival

arrival.require()  # with RecBole come its repairs, before what is here
