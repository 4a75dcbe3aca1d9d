"""Names of the published segmenters' state dicts, which are mmsegmentation's."""

__all__ = ["RULES"]

#: All rules are applied to a key, in this order. Keys of the backbone are those of the published classifiers.
RULES = (
    (r"^auxiliary_head\.(?:convs\.0\.)?", "aux_classifier."),
    (r"^decode_head\.", "classifier."),
    (r"\.conv_seg\.", ".classify.1."),
    (r"^aux_classifier\.(conv|bn)\.", r"aux_classifier.conv.\1."),
    (r"\.image_pool\.1\.", ".pooled."),
    (r"\.aspp_modules\.", ".branches."),
    (r"\.psp_modules\.(\d+)\.1\.", r".grids.\1."),
    (r"\.scale_heads\.", ".levels."),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.neck.lateral.\1."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.neck.output.\1."),
    (r"^((?:aux_)?classifier\..*)\.conv\.(weight)$", r"\1.0.\2"),
    (r"^((?:aux_)?classifier\..*)\.bn\.", r"\1.1."),
)
