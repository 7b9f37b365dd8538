"""`holdfast plan`: is spot capacity worth it for this job, on what, how, at what cost and by when? Computed, never printed here.

what somebody said, measured, or that is assumed (`figures`, `case`, `measured`, `assumed`, `prices`)
  → what the simulator needs to know (`terms`) → made-up markets (`markets`) → the engine with the real policies (`montecarlo`)
  → `breakeven`, `sensitivity`, `pilot`, `checklist` → `verdict` → one `Plan` (`plan`)
"""
