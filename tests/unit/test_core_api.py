"""The pack against the records of ComfyUI's releases: names, parameters, overridden methods.

A release is recorded with `python tests/core_api.py --record COMFYUI_FOLDER VERSION`.
"""

from pathlib import Path
from textwrap import dedent

import core_api
import pytest
import stillmotion
from core_check import BARE, HOLDS, findings
from core_release import Release, Signature
from core_uses import GIVEN, GIVEN_CLASSES, Pack

# Accepted findings, with the reason. Remove an entry once no release reports it.
EXCEPTIONS = {
    "nodes/common/quantized.py: comfy.quant_ops.get_layout_class is not there":
        "reached only where `_reads_marks` found it",
}
RECORDED = core_api.load()
PACK = Pack.of_folder(Path(stillmotion.__file__).parent)


@pytest.mark.parametrize("version", RECORDED)
def test_every_release_has_what_the_pack_uses(version):
    wrong = [each for each in findings(PACK, Release(version, RECORDED[version]))
             if each.exception not in EXCEPTIONS]
    assert not wrong, "\n" + "\n".join(map(str, wrong))


def test_every_exception_is_still_needed():
    found = {each.exception for version, names in RECORDED.items() for each in findings(PACK, Release(version, names))}
    assert not EXCEPTIONS.keys() - found


def test_the_oldest_release_and_the_analysis_are_there():
    """With no records or no analysis, there would be no findings either."""
    assert "0.3.75" in RECORDED and len(RECORDED) >= 7
    files = {use.file for use in PACK.uses}
    assert {"nodes/common/clip.py", "nodes/dynamicrafter/base.py", "nodes/causal_wan/live.py"} <= files
    derived = {own.name for own in PACK.classes if own.bases}
    assert {"DynamiCrafterModel", "CausalWanModel", "VideoUNetModel", "VisionTower", "FlatConv3d"} <= derived


@pytest.mark.parametrize("version", RECORDED)
def test_what_parameters_and_attributes_are_taken_for_is_there(version):
    release = Release(version, RECORDED[version])
    for path in {*GIVEN.values(), *GIVEN_CLASSES.values(), *HOLDS.values()}:
        assert release.find(path).is_class, path
    assert {*BARE, *BARE.values(), *HOLDS} <= release.names.keys()


# ---- recording ----

OLD = {
    "comfy/sd.py": """
        from comfy.model_base import BaseModel
        class VAE:
            def __init__(self, sd=None, device=None):
                self.first_stage_model = None
            def decode(self, samples_in, vae_options={}):
                self.last = 1
            @staticmethod
            def plain(a, *, b): pass
            @classmethod
            def other(cls, a): pass
            @property
            def size(self): pass
        def load(path, *rest, name=1, **more): pass
        def count(model): pass
        """,
    "comfy/model_base.py": """
        import enum
        import torch
        import comfy.utils as tools
        class ModelType(enum.Enum):
            EPS, V = 1, 2
        class BaseModel(torch.nn.Module):
            def __init__(self, config, device=None):
                super().__init__()
                self.config = config
            def extra_conds(self, **kwargs): pass
            def memory_required(self, input_shape, cond_shapes={}): pass
            def saved(self, clip=None): pass
        """,
    "comfy/utils.py": """
        if True:
            def resize(x, size): pass
        same = resize
        CONSTANT = 1
        """,
    "comfy/cli_args.py": """
        parser = make()
        parser.add_argument("--preview-size", type=int)
        args = parser.parse_args()
        """,
    "comfy_api/latest/__init__.py": "from . import _io_public as io",
    "comfy_api/latest/_io_public.py": "from ._io import *",
    "comfy_api/latest/_io.py": """
        class Base:
            class Input:
                def __init__(self, id, tooltip=None): pass
        class Int(Base):
            class Input(Base.Input):
                def __init__(self, id, default=0): pass
        class Model(Base): pass
        @dataclass
        class Schema:
            node_id: str
            category: str = "x"
        """,
}
NEW = {**OLD, "comfy/sd.py": OLD["comfy/sd.py"].replace("def count(model)", "def count_layers(model)"),
       "comfy/model_base.py": OLD["comfy/model_base.py"].replace("saved(self, ", "saved(self, unet, ")}


def release(folder, sources, version="1.0.0"):
    for name, text in sources.items():
        path = folder / version / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return core_api.read_release(folder / version)


def test_what_is_recorded(tmp_path):
    names = release(tmp_path, OLD)
    assert {key: names[key] for key in names if key.startswith("comfy.sd:")} == {
        "comfy.sd:": "module", "comfy.sd:BaseModel": "import comfy.model_base.BaseModel", "comfy.sd:VAE": "class",
        "comfy.sd:VAE.__init__": "(self, sd=, device=)", "comfy.sd:VAE.first_stage_model": "set",
        "comfy.sd:VAE.decode": "(self, samples_in, vae_options=)", "comfy.sd:VAE.last": "value",
        "comfy.sd:VAE.plain": "staticmethod(a, *, b)", "comfy.sd:VAE.other": "classmethod(cls, a)",
        "comfy.sd:VAE.size": "property", "comfy.sd:load": "(path, *rest, name=, **more)",
        "comfy.sd:count": "(model)"}
    assert names["comfy.utils:resize"] == "(x, size)" and names["comfy.utils:same"] == "as resize"
    assert names["comfy.model_base:ModelType"] == "class enum.Enum"
    assert names["comfy.model_base:tools"] == "import comfy.utils"
    assert names["comfy.cli_args:args.preview_size"] == "value"
    assert names["comfy_api.latest._io:Schema.__init__"] == "(self, node_id, category=)"


def test_releases_are_kept_in_order_and_come_back_as_they_were(tmp_path):
    new, old = release(tmp_path, NEW, "1.10.0"), release(tmp_path, OLD, "1.9.0")
    core_api.save({"1.10.0": new, "1.9.0": old}, tmp_path / "names.json")
    assert list(core_api.load(tmp_path / "names.json").items()) == [("1.9.0", old), ("1.10.0", new)]
    text = (tmp_path / "names.json").read_text()
    assert '\n"count": {"1.9.0": "(model)", "1.10.0": ""}' in text and '\n"count_layers": {"1.10.0": "(model)"}' in text
    assert '\n"load": "(path, *rest, name=, **more)"' in text


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no ComfyUI.*main.py"):
        core_api.read_release(tmp_path)


def test_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'newest' is no version.*as 0.3.75"):
        core_api.save({"newest": {}}, tmp_path / "names.json")
    assert not list(tmp_path.iterdir())


# ---- analysis ----

@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return Release("1.0.0", release(tmp_path_factory.mktemp("old"), OLD))


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return Release("2.0.0", release(tmp_path_factory.mktemp("new"), NEW, "2.0.0"))


def faults(release, *sources):
    """Line and fault of each finding in the sources, which become nodes/a.py, nodes/b.py, ..."""
    pack = Pack({f"nodes/{name}.py": dedent(text) for name, text in zip("abc", sources)})
    return [f"{each.line}: {each.fault}" for each in findings(pack, release)]


@pytest.mark.parametrize("source", [
    "from comfy.sd import VAE, load, count",
    "import comfy.utils\ncomfy.utils.same(1, 2)",
    "import comfy.sd as sd\nsd.load('p', 1, 2, name=2, other=3)\nsd.VAE().decode(1)\nsd.VAE.decode(None, 1)",
    "import comfy.sd\ncomfy.sd.VAE.plain(1, b=2)\ncomfy.sd.VAE.other(1)\ncomfy.sd.VAE().size.anything(1)",
    "import comfy.sd\ncomfy.sd.VAE(*given)\ncomfy.sd.VAE.plain(*given, **named)",
    "from comfy_api.latest import io\nio.Int.Input('x', default=1)\nio.Model.Input('x', tooltip=1)\nio.Schema('x')",
    "from comfy.cli_args import args\nargs.preview_size\ndef f(args): return args.other\ng = lambda *args: args.more",
    "import comfy.model_base\nkinds = comfy.model_base.ModelType\nkinds.V.value\nkinds['EPS']",
    "import comfy.utils\nfound = getattr(comfy.utils, 'later', None)\nhasattr(comfy.utils, 'later')",
    "from functools import partial\nfrom comfy.sd import VAE\npartial(VAE.plain, b=1)",
    "def f(vae):\n    vae = other()\n    return vae.anything",
    "from comfy.model_base import BaseModel\nclass M(BaseModel):\n    def f(self): return self.config, self.modules()",
])
def test_what_fits_is_let_through(old, source):
    assert faults(old, source) == []


@pytest.mark.parametrize("source, fault", [
    ("import comfy.gone", "1: comfy.gone is not there"),
    ("from comfy.sd import gone", "1: comfy.sd.gone is not there"),
    ("def f():\n    from comfy import gone", "2: comfy.gone is not there"),
    ("import comfy.sd\nx = comfy.sd.gone.more", "2: comfy.sd.gone.more is not there"),
    ("from comfy import sd\nother = sd\nother.gone", "3: comfy.sd.gone is not there"),
    ("import comfy.utils\ngetattr(comfy.utils, 'gone')", "2: comfy.utils.gone is not there"),
    ("import comfy.model_base\nk = comfy.model_base.ModelType\nk.GONE",
     "3: comfy.model_base.ModelType.GONE is not there"),
    ("from comfy.cli_args import args\nargs.gone", "2: comfy.cli_args.args.gone is not there"),
    ("from comfy.sd import count\ncount()", "2: comfy.sd.count(): model not given"),
    ("from comfy.sd import count\ncount(1, 2)", "2: comfy.sd.count(): 2 positional arguments, at most 1 allowed"),
    ("from comfy.sd import count\ncount(net=1)", "2: comfy.sd.count(): no parameter net"),
    ("from comfy.sd import count\ncount(1, model=1)", "2: comfy.sd.count(): model given twice"),
    ("from comfy.utils import same\nsame(1)", "2: comfy.utils.same(): size not given"),
    ("from comfy.sd import VAE\nVAE(config=1)", "2: comfy.sd.VAE(): no parameter config"),
    ("from comfy.sd import VAE\nv = VAE()\nv.decode(1, tile=1)", "3: comfy.sd.VAE.decode(): no parameter tile"),
    ("def f(vae): return vae.gone", "1: comfy.sd.VAE.gone is not there"),
    ("import comfy.sd\ndef f(x: comfy.sd.VAE | None): x.decode()", "2: comfy.sd.VAE.decode(): samples_in not given"),
    ("class A:\n    def __init__(self, vae): self.v = vae\n    def f(self): self.v.gone",
     "3: comfy.sd.VAE.gone is not there"),
    ("import comfy.sd\ndef f() -> comfy.sd.VAE: pass\ndef g():\n    v = f()\n    v.gone",
     "5: comfy.sd.VAE.gone is not there"),
    ("from functools import partial\nfrom comfy.sd import VAE\npartial(VAE.plain, c=1)",
     "3: comfy.sd.VAE.plain(): no parameter c"),
    ("from comfy_api.latest import io\nio.Int.Input('x', advanced=True)",
     "2: comfy_api.latest.io.Int.Input(): no parameter advanced"),
    ("from comfy_api.latest import io\nio.Schema('x', search_aliases=[])",
     "2: comfy_api.latest.io.Schema(): no parameter search_aliases"),
    ("def f(operations): return operations.Gone(1)", "1: comfy.ops.manual_cast.Gone is not there"),
])
def test_what_does_not_fit_is_found(old, source, fault):
    if "operations" in source:
        old = Release("0.3.75", RECORDED["0.3.75"])
    assert faults(old, source) == [fault]


def test_a_name_that_newer_releases_lack(old, new):
    source = "from comfy.sd import count as counted\ncounted(1)"
    assert faults(old, source) == []
    assert faults(new, source) == ["1: comfy.sd.count is not there", "2: comfy.sd.count is not there"]


def test_names_that_pass_through_other_modules_of_the_pack(new):
    here = "from ..nodes.b import kinds, VAE, make\nfrom . import b\nVAE(1, 2, 3)\nb.VAE().gone\nmake().more"
    there = "from comfy.sd import VAE\ndef make() -> VAE: pass\nkinds = 1"
    assert faults(new, here, there) == [
        "3: comfy.sd.VAE(): 3 positional arguments, at most 2 allowed", "4: comfy.sd.VAE.gone is not there",
        "5: comfy.sd.VAE.more is not there"]


MODEL = """
        from comfy.model_base import BaseModel
        class Ours(BaseModel):
            def {definition}:
                {body}
        """


@pytest.mark.parametrize("definition, fault", [
    ("extra_conds(self, **kwargs)", ""),
    ("extra_conds(self, noise=None)", "takes no **kwargs"),
    ("memory_required(self, input_shape, cond_shapes={})", ""),
    ("memory_required(self, shape, cond_shapes={}, more=1)", ""),
    ("memory_required(self, shape, *args, **kwargs)", ""),
    ("memory_required(self, *args, **kwargs)", ""),
    ("memory_required(self, input_shape, shapes={})", "has shapes where core has cond_shapes"),
    ("memory_required(self, cond_shapes, input_shape)", "has cond_shapes where core has input_shape"),
    ("memory_required(self, input_shape)", "takes no cond_shapes"),
    ("memory_required(self, input_shape, cond_shapes, more)", "requires cond_shapes, more, which core does not pass"),
    ("memory_required(self, input_shape, cond_shapes={}, *, more)", "requires more, which core does not pass"),
    ("unrelated(self, anything)", ""),
])
def test_overrides_take_what_core_passes(old, definition, fault):
    name = definition.partition("(")[0]
    found = faults(old, MODEL.format(definition=definition, body="pass"))
    assert found == ([f"4: Ours.{name} {fault}"] if fault else [])


def test_an_override_that_newer_releases_call_otherwise(old, new):
    source = MODEL.format(definition="saved(self, clip=None)", body="return super().saved(clip)")
    assert faults(old, source) == []
    assert faults(new, source) == ["4: Ours.saved takes no clip"]


@pytest.mark.parametrize("body, fault", [
    ("super().extra_conds(x=1)", ""),
    ("super().extra_conds(1)", "super().extra_conds(): 1 positional arguments, at most 0 allowed"),
    ("super().gone()", "super().gone is not there"),
    ("self.memory_required()", "self.memory_required(): input_shape not given"),
    ("self.gone", "self.gone is not there"),
    ("self.own()", ""),
])
def test_self_and_super_in_classes_of_ours(old, body, fault):
    own = f"    def own(self):\n                {body}"
    source = MODEL.format(definition="other(self)", body="self.mine = self.mine") + own
    assert faults(old, source) == ([f"7: Ours: {fault}"] if fault else [])


def test_bases_are_followed_through_our_own_classes(old):
    there = "import comfy.model_base\nclass Middle(comfy.model_base.BaseModel):\n    def mine(self): pass"
    here = """
        from .b import Middle
        class Mixin:
            def saved(self, clip=None):
                return super().saved(clip, 2)
        class Ours(Mixin, Middle):
            def memory_required(self):
                self.mine()
                self.gone
        Ours()
        """
    assert faults(old, here, there) == [
        "5: Mixin: super().saved(): 2 positional arguments, at most 1 allowed",
        "7: Ours.memory_required takes no input_shape", "9: Ours: self.gone is not there",
        "10: Ours(): config not given"]


def test_a_class_that_skips_the_init_of_core_sets_what_it_sets(old):
    source = MODEL.format(definition="__init__(self)", body="{}")
    assert faults(old, source.format("self.mine = 1")) == ["4: Ours: self.config is not set"]
    assert faults(old, source.format("self.config = 1")) == []
    assert faults(old, source.format("super().__init__(1)")) == []


@pytest.mark.parametrize("entry, bound, text", [
    ("(self, a, b=)", True, "(a, b=)"), ("(self, a)", False, "(self, a)"), ("staticmethod(a)", True, "(a)"),
    ("classmethod(cls, a)", False, "(a)"), ("(*args)", True, "(*args)"), ("()", False, "()"),
])
def test_what_a_caller_has_to_give(entry, bound, text):
    assert Signature(entry, bound).text == text


# ---- findings from when the records were made ----

def found_in(version, source):
    return faults(Release(version, RECORDED[version]), source)


@pytest.mark.parametrize("version, there", [(version, core_api.order(version) < (0, 18, 1)) for version in RECORDED])
def test_count_conv3d_left_the_vae_of_wan(version, there):
    source = "from comfy.ldm.wan.vae import count_conv3d"
    assert found_in(version, source) == ([] if there else ["1: comfy.ldm.wan.vae.count_conv3d is not there"])


def test_saving_takes_a_first_argument():
    source = "import comfy.model_base\ndef f(m: comfy.model_base.BaseModel): m.state_dict_for_saving()"
    assert found_in("0.8.1", source) == []
    assert found_in("0.33.0", source) == [
        "2: comfy.model_base.BaseModel.state_dict_for_saving(): unet_state_dict not given"]


def test_convolutions_are_told_how_to_pad():
    source = "def f(conv3d):\n    class C(conv3d):\n        def _conv_forward(self, x, w, b, *, more=1, **k): pass"
    assert found_in("0.33.0", source) == ["3: C._conv_forward takes no *args"]
    assert found_in("0.33.0", source.replace(", *, more=1, **k", "")) == ["3: C._conv_forward takes no autopad"]


def test_a_sampler_is_called_as_the_samplers_of_core_are():
    source = "import comfy.samplers\nclass S(comfy.samplers.Sampler):\n    def sample(self, model_wrap, sigmas): pass"
    for version in RECORDED:
        assert found_in(version, source) == ["3: S.sample takes no extra_args"]


def test_schema_fields_of_newer_releases():
    source = "from comfy_api.latest import io\nio.Schema(node_id='x', search_aliases=['y'])"
    assert found_in("0.3.75", source) == ["2: comfy_api.latest.io.Schema(): no parameter search_aliases"]
    assert found_in("0.33.0", source) == []
