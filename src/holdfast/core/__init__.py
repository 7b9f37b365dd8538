"""L0: words that every floor shares: errors, time, identities, quantities, events and the contract between processes."""
