"""L3, without machines: market policies on traces. The policies are those of `policy.market`; nothing here decides."""
