"""From a uri to batches.

`sources` opens records by uri. `examples` makes an `Example` of a record and its config entry.
`datasets` gives the examples of a source by index, `mixture` mixes sources, and `batches` reads the
mixture with grain.
"""
