"""L4: what tests need, shipped for users too: servers, stores that misbehave, and the suites that every implementation passes.

Import from the modules: `holdfast.testing.servers` (real servers of every cloud's protocol), `holdfast.testing.faulty_store`
(faults above the client), `holdfast.testing.http_faults` (faults on the wire), `holdfast.testing.store_conformance` (needs
pytest).
"""
