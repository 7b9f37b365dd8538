"""What stands around a launch at GCP: the request's shape, prices, offers, the preflight, what is left behind, who may do what."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gcp_described import described
from gcp_parts import FLEET, RUN, allowed, client, compute, order
from gcp_stand_in import PROJECT, GcpStandIn
from gcp_words import stamp
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import ProviderError, UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import Leftover, MachineSpec, Order, Wanted
from holdfast.provider.gcp import CONTROLLER_PERMISSIONS, PriceTable, Rate, controller_role, machine_bindings
from holdfast.provider.gcp.asking import Images, insert_request
from holdfast.provider.gcp.words import label_value, read_label


@pytest.fixture
def cloud() -> Iterator[GcpStandIn]:
    with compute() as cloud:
        yield cloud


def body_of(order: Order, **more: Any) -> dict[str, Any]:
    """Of a request that is as Google describes it."""
    request = insert_request(order, PROJECT, Images(), **more)
    path = f"projects/{PROJECT}/zones/{request['zone']}/instances"
    described("compute", "v1").read("POST", path, {"requestId": request["requestId"]}, request["body"])
    return dict(request["body"])


def test_the_request_ends_the_machine_whatever_happens() -> None:
    """Preempted or past its time it is deleted, with its disk; nothing starts it again."""
    for market, model in (("spot", "SPOT"), ("on-demand", "STANDARD")):
        body = body_of(order(allowed=(allowed(market=market),), lifetime_s=4321))
        assert body["scheduling"] == {
            "provisioningModel": model, "instanceTerminationAction": "DELETE", "maxRunDuration": {"seconds": "4321"},
            "automaticRestart": False, "onHostMaintenance": "TERMINATE",
        }  # fmt: skip
        assert all(disk["autoDelete"] for disk in body["disks"])
        assert body["guestAccelerators"][0]["acceleratorCount"] == 2
        assert {"holdfast-fleet", "holdfast-run", "holdfast-launch", "holdfast-token"} < set(body["labels"])
        assert set(body["disks"][0]["initializeParams"]["labels"]) == set(body["labels"]) - {"holdfast-request"}
        assert "serviceAccounts" not in body
    told = body_of(order(), preemption_notice_s=120)["scheduling"]["preemptionNoticeDuration"]
    assert told == {"seconds": "120"}


def test_the_machine_as_data() -> None:
    spec = MachineSpec(
        image="projects/p/global/images/pinned", disk_gib=77, disk_type="pd-ssd", local_ssd=True, role="m@p.iam",
        network={"subnets": {"us-central1": "inner"}, "public_address": False, "tags": ["training"]},
    )  # fmt: skip
    body = body_of(order(spec=spec, tags={"team": "Räuber & Söhne"}))
    boot, local = body["disks"]
    assert boot["initializeParams"]["sourceImage"] == "projects/p/global/images/pinned"
    assert (boot["initializeParams"]["diskSizeGb"], local["type"]) == ("77", "SCRATCH")
    assert body["networkInterfaces"] == [{"subnetwork": "regions/us-central1/subnetworks/inner"}]
    assert body["serviceAccounts"] == [
        {"email": "m@p.iam", "scopes": ["https://www.googleapis.com/auth/devstorage.read_write"]}
    ]
    assert body["tags"] == {"items": ["training"]}
    assert read_label(body["labels"]["team"]) == "Räuber & Söhne"
    # These have their local disks anyway, and are told of their GPUs by the type.
    big = body_of(order(allowed=(allowed("a2-ultragpu-8g"),), spec=MachineSpec(local_ssd=True)))
    assert len(big["disks"]) == 1
    assert "guestAccelerators" not in big
    assert "nvidia" in big["disks"][0]["initializeParams"]["sourceImage"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed": (allowed("a2-highgpu-1g+nvidia-tesla-t4:1"),)},
        {"allowed": (allowed("N1 Standard"),)},
        {"lifetime_s": 29},
        {"token": "no-uuid"},
        {"token": "00000000-0000-0000-0000-000000000000"},
        {"tags": {"goog-team": "x"}},
        {"tags": {"holdfast-run": "x"}},
        {"tags": {"Team": "x"}},
        {"fleet": "x" * 64},
        {"spec": MachineSpec(network={"sub_nets": {}})},
        {"spec": MachineSpec(network={"subnets": {"europe-west4": "x"}})},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_gcp_cannot_be_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        insert_request(order(**wrong), PROJECT, Images())


@given(st.text(max_size=30))
def test_labels_say_what_was_meant(text: str) -> None:
    try:
        value = label_value(text)
    except (UsageError, UnicodeEncodeError):
        return
    assert re.fullmatch("[a-z0-9_-]{0,63}", value)
    assert read_label(value) == text


def test_a_gpu_alone_is_no_machine() -> None:
    def price(table: PriceTable, instance_type: str, market: str = "spot") -> int | None:
        def never() -> Any:
            raise AssertionError("a table needs no machine type")

        return table.machine_microusd_h(allowed(instance_type, market=market).pool, never)

    t4 = Rate(of="nvidia-tesla-t4", spot_microusd_h=110_000, on_demand_microusd_h=350_000)
    n1 = Rate(of="n1-standard-8", spot_microusd_h=80_000)
    dear = Rate(of="n1-standard-8", region="us-central1", spot_microusd_h=90_000, on_demand_microusd_h=380_000)
    assert price(PriceTable([t4]), "n1-standard-8+nvidia-tesla-t4:2") is None
    assert price(PriceTable([n1]), "n1-standard-8+nvidia-tesla-t4:2") is None
    assert price(PriceTable([t4, n1]), "n1-standard-8+nvidia-tesla-t4:2") == 300_000
    assert price(PriceTable([t4, n1]), "n1-standard-8+nvidia-tesla-t4:2", "on-demand") is None
    assert price(PriceTable([t4, n1, dear]), "n1-standard-8+nvidia-tesla-t4:2") == 310_000
    assert price(PriceTable([t4, n1, dear]), "n1-standard-8", "on-demand") == 380_000
    with pytest.raises(UsageError, match="twice"):
        PriceTable([n1, n1])


def sku(
    said: str, nanousd: int, *, usage: str = "OnDemand", unit: str = "h", region: str = "us-central1"
) -> dict[str, Any]:
    """An entry of the catalogue."""
    price = {"currencyCode": "USD", "units": str(nanousd // 10**9), "nanos": nanousd % 10**9}
    rates = (
        [{"startUsageAmount": 0, "unitPrice": {"currencyCode": "USD", "units": "0", "nanos": 0}}]
        if "Static" in said
        else []
    )
    rates.append({"startUsageAmount": len(rates), "unitPrice": price})
    return {
        "description": said, "serviceRegions": [region], "category": {"usageType": usage, "resourceFamily": "Compute"},
        "pricingInfo": [{"pricingExpression": {"usageUnit": unit, "tieredRates": rates}}],
    }  # fmt: skip


CATALOGUE = [
    sku("N1 Predefined Instance Core running in Americas", 31_611_000),
    sku("N1 Predefined Instance Ram running in Americas", 4_237_000, unit="GiBy.h"),
    sku("Spot Preemptible N1 Predefined Instance Core running in Americas", 6_655_000, usage="Preemptible"),
    sku("Spot Preemptible N1 Predefined Instance Ram running in Americas", 892_000, usage="Preemptible", unit="GiBy.h"),
    sku("Commitment v1: N1 Predefined Instance Core in Americas for 1 Year", 1, usage="Commit1Yr"),
    sku("Nvidia Tesla T4 GPU running in Americas", 350_000_000),
    sku("Nvidia Tesla T4 GPU attached to Spot Preemptible VMs running in Americas", 110_000_000, usage="Preemptible"),
    sku("A2 Instance Core running in Americas", 31_611_000),
    sku("A2 Instance Ram running in Americas", 4_237_000, unit="GiBy.h"),
    sku("Nvidia Tesla A100 GPU running in Americas", 2_933_908_000),
    sku("Balanced PD Capacity", 100_000_000, unit="GiBy.mo"),
]


def test_the_catalogue_is_put_together_to_machines(cloud: GcpStandIn) -> None:
    """8 cores and 30 GiB and two T4 on spot: 53,240,000 + 26,760,000 + 220,000,000 thousand-millionths of a dollar."""
    cloud.skus = list(CATALOGUE)
    with client(cloud, prices=None) as gcp:
        wanted = Wanted(accelerators=(("T4", 2),), regions=("us-central1",))
        offers = {offer.pool.name: offer for offer in gcp.offers(wanted)}
        name = "gcp/us-central1/us-central1-b/n1-standard-8+nvidia-tesla-t4:2"
        assert set(offers) == {f"{name}/spot", f"{name}/on-demand"}
        assert offers[f"{name}/spot"].microusd_h == 300_000
        assert offers[f"{name}/on-demand"].microusd_h == 252_888 + 127_110 + 700_000
        assert {offer.on_demand_microusd_h for offer in offers.values()} == {252_888 + 127_110 + 700_000}
        # No price on spot is known of these; one on demand is.
        a100 = gcp.offers(Wanted(accelerators=(("A100", 1),), regions=("us-central1",)))
        assert {(offer.pool.market, offer.microusd_h) for offer in a100} == {("on-demand", 3_673_385)}
        asked = [each for each in cloud.asked if each.method == "cloudbilling.services.skus.list"]
        assert len(asked) == -(-len(CATALOGUE) // cloud.page_items)


def test_what_the_catalogue_does_not_say_has_no_price(cloud: GcpStandIn) -> None:
    """Two entries that disagree, none at all, and a catalogue that may not be read: nothing is guessed."""
    contradiction = sku("N1 Predefined Instance Core running in Iowa", 99)
    wanted = Wanted(instance_types=("n1-standard-8",), regions=("us-central1",))
    for skus in ([*CATALOGUE, contradiction], []):
        cloud.skus = skus
        with client(cloud, prices=None) as gcp, pytest.raises(ProviderError, match="price table"):
            gcp.offers(wanted)
    cloud.forbidden = {"cloudbilling.services.skus.list"}
    with client(cloud, prices=None) as gcp:
        with pytest.raises(ProviderError, match="price table"):
            gcp.offers(wanted)
        # A machine is launched and listed all the same, at the price that it may cost.
        assert gcp.create(gcp.request(order())).microusd_h == 900_000
        assert [machine.microusd_h for machine in gcp.machines(FLEET)] == [900_000]


def test_offers_without_gpus_are_the_smallest_that_fit(cloud: GcpStandIn) -> None:
    table = PriceTable(
        [Rate(of=name, on_demand_microusd_h=1) for name in ("n1-standard-8", "n1-standard-16", "e2-standard-8")]
    )
    with client(cloud, prices=table) as gcp:
        found = gcp.offers(Wanted(cpus=8, zones=("europe-west4-a",)))
        assert {offer.pool.instance_type for offer in found} == {"n1-standard-8", "e2-standard-8"}
        found = gcp.offers(Wanted(cpus=8, memory_gib=60, zones=("europe-west4-a",)))
        assert {offer.pool.instance_type for offer in found} == {"n1-standard-16"}
        with pytest.raises(UsageError, match="no accelerator"):
            gcp.offers(Wanted(accelerators=(("Z80", 1),)))


def test_what_is_left_behind_is_found_and_removed(cloud: GcpStandIn) -> None:
    def disk(name: str, fleet: str, age_s: float, **more: Any) -> dict[str, Any]:
        return {
            "name": name, "zone": "zones/us-central1-a", "sizeGb": "730", "type": "zones/us-central1-a/diskTypes/pd-balanced",
            "labels": {"holdfast-fleet": fleet, "holdfast-run": label_value(RUN), "holdfast-expires": "1700000000"},
            "creationTimestamp": stamp(cloud.clock.unix_s() - age_s), **more,
        }  # fmt: skip

    cloud.disks = [
        disk("lost", FLEET, 3600), disk("used", FLEET, 3600, users=["instances/x"]), disk("young", FLEET, 60),
        disk("theirs", "another", 3600),
    ]  # fmt: skip
    labels = {"holdfast-fleet": FLEET, "holdfast-run": RUN}
    cloud.addresses = [
        {"name": "kept", "region": "regions/us-central1", "status": "RESERVED", "labels": labels},
        {"name": "busy", "region": "regions/us-central1", "status": "IN_USE", "labels": labels},
    ]
    with client(cloud) as gcp:
        found = gcp.leftovers(FLEET)
        assert found == [
            Leftover(kind="disk", id="zones/us-central1-a/disks/lost", region="us-central1", microusd_h=100_000,
                     expires_unix_s=1_700_000_000, run_id=RUN),
            Leftover(kind="address", id="regions/us-central1/addresses/kept", region="us-central1", microusd_h=10_000,
                     expires_unix_s=0, run_id=RUN),
        ]  # fmt: skip
        cloud.play("disks.delete", "before")
        with pytest.raises(ProviderError, match="lost"):
            gcp.remove(found)
        for _ in range(2):
            gcp.remove(found)
        assert gcp.leftovers(FLEET) == []
        assert {each["name"] for each in cloud.disks} == {"used", "young", "theirs"}


def test_a_preflight_names_everything_that_is_missing(cloud: GcpStandIn) -> None:
    cloud.quotas |= {"PREEMPTIBLE_NVIDIA_T4_GPUS": (2, 1), "SSD_TOTAL_GB": (40, 0)}
    cloud.forbidden = {"compute.instances.create", "iam.serviceAccounts.actAs"}
    far = allowed(zone="europe-west4-a")
    with client(cloud, bucket="runs") as gcp:
        asked = order(allowed=(allowed(), far, allowed("c9-huge")), spec=MachineSpec(disk_gib=50, role="m@p.iam"))
        lines = {check.name: check for check in gcp.preflight(asked)}
        bad = {name for name, check in lines.items() if check.ok is False}
        assert bad == {
            "rights", "service account", "bucket", allowed("c9-huge").pool.name,
            *(f"quota {quota} in {region}" for quota in ("PREEMPTIBLE_NVIDIA_T4_GPUS", "SSD_TOTAL_GB")
              for region in ("us-central1", "europe-west4")),
        }  # fmt: skip
        assert all(lines[name].fix for name in bad)
        assert "compute.instances.create" in lines["rights"].said
        assert "2 needed, 1 of 2 free" in lines["quota PREEMPTIBLE_NVIDIA_T4_GPUS in us-central1"].said
        assert "europe-west4" in lines["bucket"].said
        assert cloud.made == []
    with client(cloud) as gcp:
        gcp._given_project = "no-such-project"
        (line,) = gcp.preflight(order())
        assert (line.name, line.ok) == ("credentials", False)
        refused = gcp.preflight(replace(order(), lifetime_s=1))
        assert refused


def allows(expression: str, name: str, listed: str = "") -> bool:
    """A condition of IAM, carried out: it has `startsWith`, `&&`, `||` and `!` in it."""
    text = re.sub(r'api\.getAttribute\("storage\.googleapis\.com/objectListPrefix", ""\)', "listed", expression)
    text = text.replace("resource.name", "name").replace("startsWith", "startswith")
    text = text.replace("&&", " and ").replace("||", " or ").replace("!name", " not name")
    return bool(eval(text, {"__builtins__": {}}, {"name": name, "listed": listed}))


@settings(max_examples=50)
@given(
    st.sampled_from(["launches", "control", "machines", "heads", "data", "launchesX"]),
    st.sampled_from(["runs/gpt", "runs/gpt2", "x"]),
)
def test_a_machine_reaches_its_run_and_not_what_it_may_do(folder: str, run: str) -> None:
    reads, writes = machine_bindings("gs://bucket/runs/gpt", "m@p.iam", readable=["code/"])
    name = f"projects/_/buckets/bucket/objects/{run}/{folder}/1"
    ours = run == "runs/gpt"
    assert allows(reads["condition"]["expression"], name) == ours
    assert allows(reads["condition"]["expression"], "projects/_/buckets/bucket", f"{run}/{folder}/") == ours
    assert allows(writes["condition"]["expression"], name) == (ours and folder not in ("launches", "control"))
    assert allows(reads["condition"]["expression"], "projects/_/buckets/bucket/objects/code/a.whl")
    assert not allows(writes["condition"]["expression"], "projects/_/buckets/bucket/objects/code/a.whl")
    assert reads["members"] == ["serviceAccount:m@p.iam"]


def test_who_launches_needs_no_more_than_this() -> None:
    role = controller_role()
    assert role["includedPermissions"] == list(CONTROLLER_PERMISSIONS)
    assert not any("setIamPolicy" in each or each.startswith(("storage.", "iam.")) for each in CONTROLLER_PERMISSIONS)
    with pytest.raises(UsageError):
        machine_bindings("s3://bucket/runs/gpt", "m@p.iam")
    with pytest.raises(UsageError):
        machine_bindings("gs://bucket", "m@p.iam")


def test_a_bill_is_by_the_second_with_its_disk_and_address(cloud: GcpStandIn) -> None:
    """80,000 and two times 110,000 for the machine, 50 GiB at 100,000 a month of 730 h, and 2,500 for the address."""
    hour, extras = 300_000, 6_850 + 2_500
    with client(cloud) as gcp, client(cloud) as later:
        assert gcp.extras_microusd_h(order().spec, "us-central1") == 6_850 + 5_000
        machine = gcp.create(gcp.request(order()))
        born_unix_s = machine.created_unix_s
        bill = gcp.bill(machine)
        assert (bill.billed_s, bill.final) == (60, False)
        assert bill.microusd == hour // 60 + -(-extras // 60)
        # A controller that has just come, and asks for a machine that it has never listed.
        assert later.bill(machine) == bill
        cloud.clock.advance(born_unix_s + 1000 - cloud.clock.unix_s())
        cloud.made[0] |= {"status": "TERMINATED", "lastStopTimestamp": stamp(born_unix_s + 900)}
        (stopped,) = gcp.machines(FLEET)
        bill = gcp.bill(stopped)
        assert (bill.billed_s, bill.final) == (900, False)
        assert bill.microusd == hour // 4 + -(-extras * 1000 // 3600)
        gcp.terminate([stopped])
        cloud.clock.advance(cloud.operation_s)
        (gone,) = gcp.machines(FLEET)
        last = gcp.bill(gone)
        assert (last.billed_s, last.final) == (900, True)
        assert last.microusd == hour // 4 + -(-extras * 1012 // 3600)
    # Who has not seen it alive books what it could cost at most, by its name.
    with client(cloud) as new:
        (unseen,) = new.machines(FLEET, RUN)
        bill = new.bill(unseen)
        assert (bill.billed_s, bill.microusd, bill.final) == (1012, 900_000 * 1012 // 3600, True)


def test_a_first_minute_that_was_taken_is_free(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        gcp.create(gcp.request(order()))
        cloud.preempt(cloud.made[0])
        cloud.clock.advance(60)
        (gone,) = gcp.machines(FLEET)
        bill = gcp.bill(gone)
        assert bill.final
        assert bill.microusd == -(-9_350 // 60)


def test_the_page_and_the_import() -> None:
    """The page's code runs, and Google's library is imported by calls only."""
    page = (Path(__file__).parents[3] / "docs" / "gcp.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program = "import sys\n" + code + "\nassert 'googleapiclient' not in sys.modules and 'google' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_pools_are_read_back(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        for launch, (instance_type, market) in enumerate(
            [("n1-standard-8+nvidia-tesla-t4:2", "spot"), ("n1-standard-8", "on-demand"), ("a2-highgpu-1g", "spot")], 1
        ):
            pool = gcp.create(gcp.request(order(launch, allowed=(allowed(instance_type, market=market),)))).pool
            assert pool == Pool.named(f"gcp/us-central1/us-central1-b/{instance_type}/{market}")
