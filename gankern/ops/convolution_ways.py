"""Placeholder until measured."""

MEASURED = {
    (kind, which, layout): {(64, 64, 16384): {"torch": 2.0, row: 1.0}}
    for kind, row in (
        ("upsample", "nine"),
        ("downsample", "nine"),
        ("same", "tiles2"),
        ("strided", "tiles2"),
        ("transposed", "tiles2"),
    )
    for which in ("forward", "transpose", "weight")
    for layout in ("contiguous", "channels_last")
}
