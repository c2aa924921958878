"""Models that register themselves in RecBole, one file each."""
