"""L4: what tests need, shipped for users too: servers, stores that misbehave, and the suites that every implementation passes.

Import from the modules: `holdfast.testing.servers`, `holdfast.testing.faulty_store`,
`holdfast.testing.store_conformance` (this one needs pytest).
"""
