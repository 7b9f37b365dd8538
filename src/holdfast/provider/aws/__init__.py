"""Machines of one AWS account, in several regions.

Order ──request.py──→ two calls as JSON ──create.py──→ launch template, then an instant fleet of one machine
offers.py   ← what fits: facts.py (types, images), prices.py (spot, on-demand, disks)
machines.py ← the provider's list, by tags; what is left over
preflight.py, policies.py, conformance.py: can it be done, what rights does it need, does AWS keep its promises
account.py: the SDK, and nothing else of it anywhere
"""

from holdfast.provider.aws.instances import AwsInstances

__all__ = ["AwsInstances"]
