"""Google Cloud: machines of Compute Engine, one insert into one zone at a time. See docs/gcp.md.

words       names, labels, machine types      asking      order → the exact request      answers   errors → why there is none
calls       Google's client library           creating    one insert, however often      extending   the labels' expiry
sightings   instances, operations → machines  billing     what they cost                 instances   all of it together
prices, catalog, market                       what is on offer, and for how much
leavings    disks and addresses left behind   preflight, rights
"""

from __future__ import annotations

from holdfast.provider.gcp.asking import Images
from holdfast.provider.gcp.instances import GcpInstances
from holdfast.provider.gcp.prices import Prices, PriceTable, Rate, Shape
from holdfast.provider.gcp.rights import CONTROLLER_PERMISSIONS, controller_role, machine_bindings

__all__ = [
    "CONTROLLER_PERMISSIONS",
    "GcpInstances",
    "Images",
    "PriceTable",
    "Prices",
    "Rate",
    "Shape",
    "controller_role",
    "machine_bindings",
]
