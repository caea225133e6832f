"""Each optimizer has one style in all pictures."""

from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.report.styles import style, styles


def test_every_optimizer_of_the_plugin_has_a_style_of_its_own() -> None:
    known = {n: c for n, c in OPTIMIZERS.items() if c.__module__.startswith("megatron_s3.")}
    own = [style(name) for name in known]
    assert None not in own and len(set(own)) == len(own)
    assert [style(cls.description.label) for cls in known.values()] == own
    for part in ("colour", "line", "marker", "hatch"):
        assert len({getattr(each, part) for each in own}) == len(own), part


def test_a_label_with_settings_has_its_optimizers_style() -> None:
    assert style("S3, ramp, warmup 30 %") == style("s3")
    assert style("adam") == style("AdamW, clipped") == style("adamw")
    assert style("SGD with momentum") == style("sgdm")
    assert style("Muon") is None


def test_the_styles_of_one_picture_differ() -> None:
    labels = ["mine", "S3", "S3, ramp", "AdamW", "yours"]
    found = styles(labels)
    assert len(set(found)) == len(labels)
    assert found[1] == style("S3") and found[3] == style("AdamW")
    many = ["AdamW", "NAdam", "Muon", "Muon, S3", *(f"S3, {n}" for n in range(5))]
    assert len(set(styles(many))) == len(many)
    more = ["S3", "SOAP", *(f"model {n}" for n in range(79))]
    assert len({(each.line, each.marker) for each in styles(more)}) == len(more)
    assert len(styles([f"model {n}" for n in range(100)])) == 100
