"""Spot capacity, on-demand capacity, or wait? One module per policy; `registry` knows them by name, `base` says what goes in
and out."""
