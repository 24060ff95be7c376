"""From a uri to batches: `sources` (uri → records), `examples` (record + Source → Example), `pipeline` (grain)."""
