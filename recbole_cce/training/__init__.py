"""The trainer and what it is made of: steps, evaluation, checkpoints, memory."""

from recbole_cce import arrival

arrival.require()  # with RecBole come its repairs, before what is here
