"""L2: what a machine says before it goes, from every provider, as one stream of notices with one deadline each.

    provider's protocol → a watcher (aws, gcp, azure, slurm, kubernetes, signals, file)
                        → merging (pure: the same event from two sources, slides, withdrawals) → stream → listen → on_notice

Whoever needs notices (agent, trainer, command line) calls `holdfast.notice.listen.listen` and imports nothing else but `base`.
"""
