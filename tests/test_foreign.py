"""Networks that were not written here: as teachers in real training, in threads, under autocast, and when things fail."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnkd_nb.core import UserError, sha256_of, torchvision
from snnkd_nb.data.images import load, subset
from snnkd_nb.losses.base import default_pairs
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.foreign import (
    create_foreign,
    patch_size_for,
    read_weights_into,
    vit_small,
    with_image_channels,
)
from snnkd_nb.models.imagenet import (
    PreActBlock,
    imagenet_resnet,
    load_torchvision,
    resnet18_imagenet,
)
from snnkd_nb.models.taps import Foreign, Tap, find_classifier, from_map, to_map
from snnkd_nb.models.zoo import catalogue, create_model, model_info
from snnkd_nb.spec import ModelSpec
from snnkd_nb.training.loop import fit


def resnet(channels=3, **kw):
    "A torchvision ResNet of one block a layer, narrow enough for a test."
    torch.manual_seed(0)
    models = torchvision("models.resnet")
    net = models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=8)
    return Foreign(with_image_channels(net, channels), image_size=32, **kw)


def vit(**kw):
    return torch.manual_seed(0) and vit_small(width=0.1, blocks=2, patch=8, **kw)


def images(b=3, seed=0):
    return torch.randn(b, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def hooks_in(net):
    return sum(len(m._forward_hooks) for m in net.modules())


MAKERS = {
    "resnet": resnet,
    "vit": vit,
    "vit raw": lambda: vit(tokens="raw"),
    "resized": lambda: resnet(input_size=48),
}


@pytest.fixture(scope="module", params=MAKERS)
def net(request):
    return MAKERS[request.param]().eval()


def test_every_stage_leads_to_the_same_logits(net):
    x = images()
    with torch.no_grad():
        logits, feats = net(x, features=True)
    assert tuple(feats) == net.stage_names and logits.equal(net(x))
    for s, f in feats.items():
        assert tuple(f.shape[1:]) == net.feature_shapes()[s] and net.forward_from(s, f).equal(
            logits
        )
        given = f.detach().clone().requires_grad_()
        y = net.forward_from(s, given, getattr(f, "prefix", None))
        assert y.equal(logits)
        grad = torch.autograd.grad(y.sum(), given)[0]
        assert grad.isfinite().all() and (
            grad.abs().sum() > 0 or s == "stage2"
        )  # ViT's head reads the class token alone


def test_gradient_of_the_rest_is_that_of_the_whole():
    net, x = resnet().eval(), images()
    logits, feats = net(x, features=True)
    whole = torch.autograd.grad(logits.square().sum(), list(feats.values()))
    for (s, f), g in zip(feats.items(), whole):
        given = f.detach().clone().requires_grad_()
        assert torch.allclose(
            torch.autograd.grad(net.forward_from(s, given).square().sum(), given)[0],
            g,
            rtol=1e-4,
            atol=1e-7,
        )


def test_features_are_those_of_torch_fx():
    from torchvision.models.feature_extraction import create_feature_extractor

    net, x = resnet().eval(), images()
    theirs = create_feature_extractor(net.net, {t.path: n for n, t in net.taps.items()})(x)
    for n, f in net(x, features=True)[1].items():
        assert torch.allclose(f, theirs[n], atol=1e-6)


def test_nothing_is_left_behind(net):
    x, state, rng = images(), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.train()
    f = {n: torch.randn(2, *s) for n, s in net.feature_shapes().items()}
    for s in net.stage_names[:1]:
        net.forward_from(s, f[s], prefix="mean")
    net.feature_shapes()
    front = next(iter(net.state_dict()))
    assert net.training and net.state_dict()[front].equal(state[front]) and hooks_in(net) == 0
    net.load_state_dict(state)
    with pytest.raises(Exception):  # noqa: B017 (any error, of any layer)
        net(x[:, :, 0], features=True)
    with pytest.raises(UserError):
        net.forward_from(net.stage_names[0], x[:, :1])
    assert hooks_in(net) == 0 and net.eval()
    torch.set_rng_state(rng)
    again = pickle.loads(pickle.dumps(net))
    assert again(x).equal(net(x)) and copy.deepcopy(net)(x, features=True)[0].equal(net(x))


def test_threads_see_their_own_features():
    net, found = resnet().eval(), {}
    alone = {i: net(images(2, i), features=True)[1]["stage2"] for i in range(4)}

    def work(i):
        for _ in range(5):
            found[i] = net(images(2, i), features=True)[1]["stage2"]

    workers = [threading.Thread(target=work, args=(i,)) for i in alone]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert all(found[i].equal(alone[i]) for i in alone) and hooks_in(net) == 0


def test_under_autocast(net):
    x, stage = images(), net.stage_names[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, feats = net(x, features=True)
        rest = net.forward_from(stage, feats[stage])
        assert rest.dtype == torch.bfloat16 and rest.equal(logits) and net(x).equal(logits)


def test_under_inference_mode_and_on_meta():
    with torch.inference_mode():
        net = resnet().eval()
    with torch.inference_mode():
        logits, feats = net(images(), features=True)
    with torch.inference_mode():
        assert net.forward_from("stage1", feats["stage1"]).equal(logits)
    with torch.device("meta"):
        wide = vit_small(image_size=224)
    assert wide.feature_shapes()["stage1"] == (384, 14, 14) and wide.forward_from(
        "stage3", torch.empty(2, 384, 14, 14, device="meta"), "mean"
    ).shape == (2, 10)


def test_oblong_images_give_oblong_maps():
    net = Foreign(
        nn.Sequential(
            nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), Swap(), nn.Linear(4, 6), Mean(), nn.Linear(6, 2)
        ),
        ["3"],
        16,
    )
    logits, feats = net(torch.randn(2, 3, 32, 16), features=True)
    assert feats["3"].shape == (2, 6, 8, 4) and net.forward_from("3", feats["3"]).equal(logits)


class Swap(nn.Module):
    "Maps to tokens."

    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    "Mean of the tokens."

    def forward(self, x):
        return x.mean(1)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 6), prefix=st.integers(0, 4))
def test_tokens_to_map_and_back(b, c, h, prefix):
    tokens, tap = torch.rand(b, prefix + h * h, c), Tap("", 3, prefix)
    m = to_map(tokens, tap)
    assert m.shape == (b, c, h, h) and from_map(m, tap, m.prefix).equal(tokens)


@given(size=st.integers(1, 512))
def test_patches_tile_the_image(size):
    assert size % patch_size_for(size) == 0 and patch_size_for(size) <= 16


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_foreign_teacher_teaches(name):
    torch.manual_seed(0)
    data = subset(load("digits"), 120, 0)
    net = (
        resnet(channels=1)
        if name == "resnet"
        else vit_small(width=0.1, blocks=3, image_size=8, in_channels=1)
    )
    student = create_model("resnet20", T=2, width=0.25, depth=0.34, in_channels=1, image_size=8)
    pairs = [["stage2", "stage1"], ["stage3", "stage2"]]
    distiller = create_distiller("kd+feature", student, net, pairs=pairs)
    before, head = copy.deepcopy(net.state_dict()), student.head.out.weight.clone()
    history = fit(
        student,
        data,
        distiller,
        epochs=2,
        batch_size=32,
        lr=0.02,
        device="cpu",
        on_event=lambda e: None,
        weak_teacher="accept",
    )
    assert {"ce", "kd"} <= set(history[-1]) and history[-1]["feature"] < history[0]["feature"]
    assert (
        all(v.equal(before[k]) for k, v in net.state_dict().items())
        and not student.head.out.weight.equal(head)
        and hooks_in(net) == 0
    )


def test_default_pairs_from_the_output_backwards():
    student = create_model("resnet20", T=2, width=0.25, image_size=32)
    method = create_distiller("feature", student, resnet()).methods[0]
    assert method.pairs == [
        ("stem", "stage1"),
        ("stage1", "stage2"),
        ("stage2", "stage3"),
        ("stage3", "stage4"),
    ]


def test_a_spec_can_say_all_of_it():
    spec = ModelSpec(
        "torchvision:resnet18",
        args={"stages": {"early": "layer1", "late": "layer3"}, "tokens": "map"},
    )
    other = ModelSpec("torchvision:resnet18", args={"stages": ["layer2"]})
    with torch.device("meta"):
        nets = [create_foreign(*s.name.split(":"), **s.args) for s in (spec, other)]
    assert [n.stage_names for n in nets] == [("early", "late"), ("layer2",)]


def test_timm_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        vit_small()


def test_pretrained_without_a_connection_is_one_line(monkeypatch):
    import timm

    def offline(*args, **kw):
        raise OSError("no route to the Hub\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="no route to the Hub; get the weights once") as e:
        vit_small(pretrained=True)
    assert "\n" not in str(e.value)
    models = torchvision("models")
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(UserError, match="weights=FILE"):
        create_foreign("torchvision", "squeezenet1_1", pretrained=True)
    with pytest.raises(UserError, match="width=1.0"):
        vit_small(pretrained=True, width=0.5)


def test_pretrained_torchvision_keeps_its_own_classifier_only_for_its_classes(monkeypatch):
    models = torchvision("models")
    theirs = models.resnet18().state_dict()
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", lambda self, **kw: theirs)
    other, same = (
        create_foreign("torchvision", "resnet18", k, pretrained=True).net for k in (10, 1000)
    )
    assert (
        other.conv1.weight.equal(theirs["conv1.weight"])
        and other.fc.out_features == 10
        and same.fc.weight.equal(theirs["fc.weight"])
    )
    with pytest.raises(UserError, match="conv1.weight is"):
        create_foreign("torchvision", "resnet18", 10, None, 1, pretrained=True)


def test_weights_in_the_data_folder_with_a_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    source = vit(num_classes=7)
    file = tmp_path / "weights" / "mine.pt"
    torch.save(source.net.state_dict(), file)
    digest = sha256_of(file)
    kw = {"width": 0.1, "blocks": 2, "patch": 8, "weights": "mine.pt"}
    assert vit_small(num_classes=7, sha256=digest, **kw)(images()).shape == (3, 7)
    net = vit_small(num_classes=10, head=False, **kw)
    assert (
        net.net.patch_embed.proj.weight.equal(source.net.patch_embed.proj.weight)
        and net.num_classes == 10
    )
    with pytest.raises(UserError, match="head.weight is"):
        vit_small(num_classes=10, **kw)
    with pytest.raises(UserError, match="SHA-256 begins"):
        vit_small(num_classes=7, sha256="0" * 64, **kw)
    renamed = file.rename(file.with_name(f"mine-{digest[:8]}.pth"))
    assert read_weights_into(source.net, renamed) and read_weights_into(source.net, renamed.name)
    with pytest.raises(UserError, match="SHA-256 begins"):
        read_weights_into(
            source.net, file.with_name(renamed.name).rename(tmp_path / "mine-01234567.pth")
        )


def test_a_pickle_with_code_is_not_run(tmp_path):
    torch.save({"w": threading.Lock}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights_into(nn.Linear(1, 1), tmp_path / "evil.pt")


# names, sizes and options that cannot be meant


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "resnet20"])
@pytest.mark.parametrize(
    "kw",
    [
        {"num_classes": 0},
        {"num_classes": True},
        {"in_channels": 0},
        {"image_size": "32"},
        {"image_size": 0},
        {"width": True},
        {"width": 0},
    ],
)
def test_every_name_is_checked_alike(name, kw):
    key, value = next(iter(kw.items()))
    with pytest.raises(UserError, match=f"{key} = {value!r}"):
        create_model(name, **kw)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_lie_channels_last_as_promised(name):
    net = create_model(name)
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    )


def test_foreign_refuses_what_it_cannot_mean():
    for kw in (
        {"image_size": "32"},
        {"image_size": True},
        {"input_size": 0.5},
        {"in_channels": "3"},
    ):
        with pytest.raises(UserError, match=f"{next(iter(kw))} = "):
            Foreign(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(2)), **kw)
    with pytest.raises(UserError, match="pretrained = 'yes'"):
        create_foreign("torchvision", "resnet18", pretrained="yes")


def test_model_info_knows_networks_of_libraries():
    assert model_info("torchvision:resnet18", num_classes=1000)["params"] == {"ann": 11_689_512}
    assert (
        model_info("timm:resnet18")["stages"] == ("stem", "stage1", "stage2", "stage3", "stage4")
        and catalogue("vit_small")[0]["stages"] == 12
    )
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        model_info("torchvision:resnet19")


@pytest.mark.parametrize(
    "name, ours",
    [
        ("WRN-16-2", "wrn16_2"),
        ("WideResNet-16-2", "wrn16_2"),
        ("VGGSNN", "vggsnn"),
        ("ResNet-18", "resnet18"),
        ("spikformer-4-384", "spikformer"),
        ("ViT_Small", "vit_small"),
    ],
)
def test_the_papers_spelling_leads_to_ours(name, ours):
    with pytest.raises(UserError, match=f"did you mean '{ours}'") as e:
        create_model(name)
    assert len(str(e.value)) < 160


def test_images_too_small_for_a_network_say_what_to_do():
    with pytest.raises(
        UserError, match=r"--size, size= of the data\), or input_size= .* vit_small"
    ):
        create_model("timm:vit_tiny_patch16_224", in_channels=1, image_size=8)
    assert create_model("timm:vit_tiny_patch16_224", in_channels=1, image_size=8, input_size=32)(
        torch.rand(1, 1, 8, 8)
    ).shape == (1, 10)


# hashes


@pytest.mark.parametrize(
    "name", ["mine-20240131.pth", "mine-1234.pth", "mine.pth", "mine-19991231.pt"]
)
def test_a_date_in_a_name_is_no_hash(tmp_path, name):
    net = nn.Linear(2, 2)
    torch.save(net.state_dict(), file := tmp_path / name)
    assert read_weights_into(nn.Linear(2, 2), file).weight.equal(net.weight)
    with pytest.raises(UserError, match="not 20240131;"):
        read_weights_into(net, file, "20240131")


def test_a_hash_may_be_in_capitals_and_has_eight_digits(tmp_path):
    net = nn.Linear(2, 2)
    torch.save(net.state_dict(), file := tmp_path / "mine.pth")
    digest = sha256_of(file)
    for good in (digest.upper(), digest[:8].upper(), digest[:13], False):
        assert read_weights_into(net, file, good) is net
    for bad in (digest[:4], digest[:7], "x" * 8, 12345678, True):
        with pytest.raises(UserError, match="give the first eight hexadecimal digits"):
            read_weights_into(net, file, bad)
    capitals = file.rename(file.with_name(f"mine-{digest[:8].upper()}.pth"))
    assert read_weights_into(net, capitals) is net
    other = capitals.rename(file.with_name("mine-0badc0de.pth"))
    with pytest.raises(UserError, match="sha256=False if that is no hash"):
        read_weights_into(net, other)
    assert read_weights_into(net, other, False) is net


def test_weights_behind_activations_do_not_go_before_them(tmp_path):
    torch.save(
        torchvision("models").resnet18(num_classes=10).state_dict(),
        file := tmp_path / "resnet18.pth",
    )
    with pytest.raises(UserError, match="activations behind the convolutions"):
        load_torchvision(imagenet_resnet(PreActBlock, (2, 2, 2, 2)), file, sha256=False)
    with pytest.raises(UserError, match="no hash in the name"):
        load_torchvision(resnet18_imagenet(), file)
    net = load_torchvision(resnet18_imagenet(), file, sha256=sha256_of(file).upper())
    assert net.head.out.weight.equal(torch.load(file)["fc.weight"])


# classifiers


class Aux(nn.Module):
    "An auxiliary head, called or not, is registered after the classifier."

    def __init__(self, called):
        super().__init__()
        self.body, self.fc, self.aux, self.called = (
            nn.Conv2d(3, 4, 1),
            nn.Linear(4, 10),
            nn.Linear(4, 10),
            called,
        )

    def forward(self, x):
        h = self.body(x).mean((2, 3))
        if self.called:
            self.aux(h)
        y = self.fc(h)
        if self.called:
            self.aux(h)
        return y


@pytest.mark.parametrize("called", [True, False])
def test_the_classifier_is_what_makes_the_logits(called):
    assert find_classifier(Aux(called), 10, (3, 8, 8)) == "fc"


def test_a_convolution_can_be_the_classifier(tmp_path):
    theirs = create_foreign("torchvision", "squeezenet1_1", 7, image_size=64)
    assert theirs.num_features == 512
    torch.save(theirs.net.state_dict(), tmp_path / "w.pt")
    net = create_foreign(
        "torchvision", "squeezenet1_1", 5, image_size=64, weights=str(tmp_path / "w.pt"), head=False
    )
    assert net.net.features[0].weight.equal(theirs.net.features[0].weight) and net.num_classes == 5


def test_head_false_is_not_ignored_where_no_classifier_is_found(tmp_path, monkeypatch):
    from snnkd_nb.models import foreign

    def odd(*a):
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(foreign.LIBRARIES, "torchvision", odd)
    torch.save(odd().state_dict(), tmp_path / "w.pt")
    kw = {"num_classes": 5, "weights": str(tmp_path / "w.pt")}
    with pytest.raises(UserError, match="give the module path of its classifier"):
        create_foreign("torchvision", "resnet18", head=False, **kw)
    with pytest.raises(UserError, match="head = 'fc'"):
        create_foreign("torchvision", "resnet18", head="fc", **kw)
    assert create_foreign("torchvision", "resnet18", head="0", **kw).num_classes == 5


# stages


def test_a_network_without_known_stages_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.tail = nn.Linear(4, 10)

        def forward(self, x):
            return self.tail(self.body(x).mean((2, 3)))

    with pytest.warns(
        UserWarning,
        match=r"Odd has no known stages: .* stages=\[…\] of its module paths: body, tail",
    ):
        net = Foreign(Odd())
    student = create_model("resnet20", T=2, width=0.25)
    with pytest.raises(
        UserError, match=r"Odd, has no named stages: .*stages=\[…\].* its module paths: body, tail"
    ):
        default_pairs(student, net)
    with torch.device("meta"):
        shuffle = create_model("torchvision:shufflenet_v2_x0_5", image_size=64)
    assert [t.path for t in shuffle.taps.values()] == ["stage2", "stage3", "stage4"]


def test_module_paths_may_begin_at_the_wrapped_network():
    net = resnet()
    assert net.get_submodule("layer2") is net.get_submodule("net.layer2") is net.net.layer2
    with pytest.raises(AttributeError):
        net.get_submodule("layer9")
