"""Published weights: the same logits, what is refused in one line, other positions and ids, and frozen blocks."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fixtures_tokenizer import _made  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config.params import Params, load_params
from pipeline.config.sections import ModelConfig, TrainConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.published import load_published, origin_of, with_hash, write_init
from pipeline.registry.export import _hf_tokenizer
from pipeline.system import files
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import read_json, write_json
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state
from pipeline.training.preflight import _kept_by, saved_bytes, step_bytes
from tests.small_models import save_published
from tests.trainings import ROOT
from tests.unit.training.test_loop import Loop

SHAPE = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=None, dropout=0.0, fold_vocab=False, init="weights/tiny"
)
IDS = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(1))
INIT = Path("data/init")


@pytest.fixture
def tiny(tmp_path, monkeypatch, made):
    """The folder weights/tiny, in a project in which the tokenizer `bytes` has fewer ids than the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "fsync", lambda path: None)  # slow, and not tested here
    save_published(folder := Path("weights/tiny"), vocab_size=300)
    (folder / "tokenizer.json").write_text(_hf_tokenizer(made("bytes")).to_str())
    return folder


@pytest.fixture
def write(made):
    """Writes data/init for a tokenizer, by default `bytes`."""
    return lambda shape=SHAPE, name="bytes": write_init(
        shape, INIT, made(name), "a text, ein Text, 文字, <|endoftext|> in it"
    )


def edit(path, **values):
    write_json(path, {**read_json(path), **values})


def edit_tensors(folder, change):
    tensors = load_file(path := folder / "model.safetensors")
    change(tensors)
    save_file(tensors, path)


def swap_two_tokens(folder):
    values = read_json(path := folder / "tokenizer.json")
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    write_json(path, values)


def split_by_words(folder):
    values = read_json(path := folder / "tokenizer.json")
    values["model"]["merges"], values["model"]["vocab"]["aa"] = [["a", "a"]], 299
    values["normalizer"] = {"type": "Lowercase"}
    write_json(path, values)


def as_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder, file):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ("model-00001-of-00002.safetensors", file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {str(i): name for i, name in enumerate(names)}})


def truncate(folder):
    data = (path := folder / "model.safetensors").read_bytes()
    path.write_bytes(data[: len(data) // 2])


WTE = "transformer.wte.weight"
FAULTS = {
    "llama": (lambda f: edit(f / "config.json", model_type="llama"), "is a model of the type llama: only a GPT-2"),
    "relu": (lambda f: edit(f / "config.json", activation_function="relu"), "has activation_function relu, this"),
    "epsilon": (lambda f: edit(f / "config.json", layer_norm_epsilon=1e-6), "has layer_norm_epsilon 1e-06, this"),
    "untied": (lambda f: edit(f / "config.json", tie_word_embeddings=False), "has tie_word_embeddings False, this"),
    "inner": (lambda f: edit(f / "config.json", n_inner=7), "has n_inner 7, this project's GPT-2 has 4 \\* n_embd"),
    "a word": (
        lambda f: edit(f / "config.json", n_layer="two"),
        r"config.json is not of a possible GPT-2 \(n_layer 'two'",
    ),
    "heads": (lambda f: edit(f / "config.json", n_head=3), "config.json is not of a possible GPT-2"),
    "not JSON": (lambda f: (f / "config.json").write_text("["), "config.json is not JSON of a model: copy or"),
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json: give a complete folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors: save it by Transformers'"),
    "pickle": (as_pickle, r"has its weights only as a pickle \(pytorch_model.bin\), which may run any code"),
    "a part": (lambda f: index(f, "model-00002-of-00002.safetensors"), "lacks model-00002-of-00002.safetensors: copy"),
    "outside": (lambda f: index(f, "../model.safetensors"), "model.safetensors.index.json does not list its files"),
    "truncated": (truncate, "model.safetensors is truncated, or not a safetensors file"),
    "a weight": (
        lambda f: edit_tensors(f, lambda t: t.pop(WTE)),
        "has no weight wte.weight: use weights of a complete",
    ),
    "surplus": (
        lambda f: edit_tensors(f, lambda t: t.update(score=t[WTE] + 0)),
        r"model.safetensors has score \(F32\), which",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({WTE: t[WTE].int()})),
        r"model.safetensors has transformer.wte.weight \(I32\), which is no",
    ),
    "size": (lambda f: edit(f / "config.json", n_positions=13), r"has wpe.weight as \(12, 16\), by its config.json"),
    "head": (lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t[WTE] + 1})), "has a head of its own"),
    "swapped": (swap_two_tokens, "has another tokenizer than bytes: b'a' has the id 98 there, 97 here: set corpus.tok"),
    "split": (split_by_words, "has another tokenizer than bytes: they split the text apart at token "),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json, so its ids cannot be compared"),
    "unigram": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {}}'),
        "has a tokenizer that cannot be compared",
    ),
    "not finite": (
        lambda f: edit_tensors(f, lambda t: t[WTE][0].fill_(torch.nan)),
        "transformer.wte.weight has values that are not finite",
    ),
    "few ids": (lambda f: save_published(f, vocab_size=60), "has 60 ids, the tokenizer bytes 257: set corpus"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_such_a_gpt2_is_refused_in_one_line_before_anything_is_written(fault, tiny, write):
    damage, message = FAULTS[fault]
    damage(tiny)
    with pytest.raises(InputError, match=f"^weights/tiny:? {message}") as error:
        write()
    assert "\n" not in str(error.value)
    assert not INIT.exists()


def test_another_shape_is_refused_with_all_values_to_set(tiny, write):
    with pytest.raises(
        InputError, match=r"another shape than params.yaml \(model.n_layer 4, model.n_embd 32\): set model.n_layer to 2"
    ):
        write(SHAPE.updated(n_layer=4, n_embd=32))
    with pytest.raises(InputError, match=r"^weights/none not found: give a folder of a GPT-2"):
        write(SHAPE.updated(init="weights/none"))


def loaded(shape=SHAPE, n_ids=300):
    model = GPT(shape.updated(vocab_size=n_ids), Vocabulary.full(n_ids)).eval()
    load_published(model, INIT)
    return model


def test_the_model_computes_the_logits_of_the_published_one_from_any_form_of_its_files(tiny, write):
    expected, hashes = save_published(tiny, vocab_size=300)(IDS), set()
    tensors = load_file(path := tiny / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}
    for form in (tensors, plain | masks, {**tensors, "lm_head.weight": tensors[WTE] + 0}):
        save_file(form, path)
        write()
        assert torch.equal(loaded()(IDS), expected)
        hashes.add(with_hash(SHAPE, INIT).init)
    names = sorted(tensors)
    path.unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tiny / file)
    write_json(tiny / "model.safetensors.index.json", {"weight_map": {n: f for f, part in parts.items() for n in part}})
    write()
    assert torch.equal(loaded()(IDS), expected)
    assert {with_hash(SHAPE, INIT).init} == hashes


def test_other_positions_and_ids_are_cut_or_added(tiny, write):
    expected = save_published(tiny, vocab_size=300)(IDS)
    write()
    torch.testing.assert_close(loaded(SHAPE.updated(block_size=5))(IDS[:, :5]), expected[:, :5])
    longer = loaded(SHAPE.updated(block_size=30))
    assert torch.equal(longer(IDS), expected)
    assert torch.equal(longer.wpe.weight[12:24], longer.wpe.weight[:12])
    assert torch.equal(loaded(n_ids=257).wte.weight, loaded().wte.weight[:257])
    padded = loaded(n_ids=310)
    torch.testing.assert_close(padded(IDS)[..., 300:], expected.mean(dim=-1, keepdim=True).expand(3, 12, 10))


def test_the_hash_is_that_of_the_weights_and_not_of_their_place(tiny, write):
    write()
    before = with_hash(SHAPE, INIT)
    assert before.init.startswith("sha256:")
    tiny.rename("weights/moved")
    moved = SHAPE.updated(init="weights/moved")
    with pytest.raises(
        InputError, match=r"data/init has weights/tiny, model.init is weights/moved: run `dvc repro tok"
    ):
        with_hash(moved, INIT)
    write(moved)
    assert with_hash(moved, INIT) == before
    edit_tensors(Path("weights/moved"), lambda t: t.update({WTE: t[WTE] + 1}))
    write(moved)
    assert with_hash(moved, INIT) != before
    (INIT / "model.safetensors").write_bytes(b"\0")
    with pytest.raises(
        IntegrityError, match=r"data/init/model.safetensors has 1 bytes, expected .*`dvc repro -f tokeni"
    ):
        with_hash(moved, INIT)
    write(SHAPE.updated(init=None))
    assert [path.name for path in INIT.iterdir()] == ["manifest.json"]
    with pytest.raises(InputError, match=r"data/init has no weights, model.init is weights/tiny: run `dvc repro"):
        with_hash(SHAPE, INIT)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache, offline; it has the model o/tiny at the revision `main`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--o--tiny"
    save_published(folder / "snapshots" / ("c" * 40), vocab_size=300)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    return folder / "snapshots" / ("c" * 40)


def test_a_model_of_the_hub_comes_from_its_cache_without_a_network(cache, tiny, write):
    (cache / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text())
    write()
    local = with_hash(SHAPE, INIT)
    hub = SHAPE.updated(init="hf://o/tiny")
    assert "hf://o/tiny, 11,584 parameters" in write(hub)
    assert with_hash(hub, INIT) == local
    assert origin_of(INIT) == f"hf://o/tiny@{'c' * 40}"


@pytest.mark.parametrize("name", ["gpt2", "o/tiny@v2", "o/other"])
def test_a_model_that_the_cache_lacks_is_refused_with_what_to_download_and_where_to_put_it(name, cache, tiny, write):
    repo = name.partition("@")[0]
    with pytest.raises(InputError, match=f"^could not download hf://{name}: the Hub cannot be reached") as error:
        write(SHAPE.updated(init=f"hf://{name}"))
    place = f"weights/{repo.split('/')[-1]}"
    assert f"`hf download {repo} config.json model.safetensors tokenizer.json --local-dir {place}`" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_the_cache_lacks_are_named(cache, tiny, write):
    (cache / "model.safetensors").rename(cache / "model-00001-of-00002.safetensors")
    (cache / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text())
    with pytest.raises(InputError, match=r"^hf://o/tiny lacks model.safetensors: .* `hf download o/tiny"):
        write(SHAPE.updated(init="hf://o/tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.init": "hf://gpt2"}, "model.fold_vocab would replace the published rows .*: set it to false$"),
        ({"model.init": f"sha256:{'a' * 64}", "model.fold_vocab": False}, "model.init: a hash names no weights"),
        ({"train.freeze": 1}, "train.freeze 1 would keep random weights: set model.init, or freeze 0$"),
        (
            {"model.init": "hf://gpt2", "model.fold_vocab": False, "train.freeze": 2},
            "train.freeze 2 leaves no block to train: model.n_layer is 2$",
        ),
        *(
            ({"model.init": name, "model.fold_vocab": False}, "model.init: published weights are a folder in weights/")
            for name in ("/home/gpt2", "weights/../data", "hf://datasets/a/b", "hf://a/b/c", "gpt2")
        ),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(changes, message):
    params = load_params(ROOT / "params.yaml")
    for key, value in changes.items():
        section, name = key.split(".")
        params.values[section][name] = value
    with pytest.raises(InputError, match=f"params.yaml: {message}"):
        RunConfig.of(Params(params.values, params.path))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_tensors_keep_their_bits_without_gradients_and_state_and_all_others_change(name, tiny, write):
    write()
    shape = SHAPE.updated(vocab_size=300)
    loop = Loop(3, shape=shape, where={"freeze": 1}, name=name)
    train = (
        load_params(ROOT / "params.yaml")
        .section(TrainConfig)
        .updated(device="cpu", precision="fp32", threads=1, compile=False, freeze=1)
    )
    text = replace_vocabulary(loop, 300)
    loop.text, loop.state = text, fresh_state(shape, text.vocabulary, loop.optim, train, loop.machine, INIT)
    before = {key: tensor.clone() for key, tensor in loop.state.model.state_dict().items()}
    records = list(loop)
    after = loop.state.model.state_dict()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert kept == {key for key in before if key.startswith(("wte.", "wpe.", "h.0."))}
    assert {key.split("/")[0] for key in loop.state.tensors()["optimizer"]} == before.keys() - kept
    assert records[-1].loss < records[0].loss


def replace_vocabulary(loop, n_ids):
    return loop.text._replace(vocabulary=Vocabulary.full(n_ids))


def test_frozen_blocks_need_less_memory_and_smaller_checkpoints():
    whole = RunConfig.of(load_params(ROOT / "params.yaml")).sized_for(50257)
    config = replace(whole, model=whole.model.updated(n_layer=4, fold_vocab=False))
    config = replace(config, optim=config.optim.updated(name="adamw"))
    frozen = replace(config, train=config.train.updated(freeze=3))
    vocabulary, machine = Vocabulary.full(50257), Loop().machine
    with FakeTensorMode():
        kept = [_kept_by(GPT(config.model, vocabulary).freeze(n), config.windows, machine) for n in (0, 3)]
        model = GPT(config.model, vocabulary)
    sizes = [p.numel() for module in (model.wte, model.wpe, *model.h[:3]) for p in module.parameters()]
    saved = step_bytes(config, vocabulary, machine) - step_bytes(frozen, vocabulary, machine)
    of_adamw = sum(2 * 4 * size + 4 for size in sizes)  # two moments, and a number of steps
    assert saved == kept[0] - kept[1] + 4 * sum(sizes) + of_adamw
    assert kept[0] > 2 * kept[1]
    assert saved_bytes(config, vocabulary)[0] - saved_bytes(frozen, vocabulary)[0] >= of_adamw


def test_the_loss_of_a_frozen_head_has_the_same_value_and_gradient(tiny):
    model = save_published(tiny)
    values = []
    for trained in (True, False):
        model.wte.requires_grad_(trained)
        model.zero_grad()
        shapes = set()
        with saved_tensors_hooks(
            lambda tensor, shapes=shapes: shapes.add(tensor.shape) or tensor, lambda tensor: tensor
        ):
            loss = model.loss(IDS, IDS, IDS.numel())
        assert (model.wte.weight.shape in shapes) == trained  # its gradient, which takes as much memory
        loss.backward()
        values.append((loss.item(), model.ln_f.weight.grad.clone(), model.wte.weight.grad))
    assert values[0][0] == values[1][0]
    assert torch.equal(values[0][1], values[1][1])
    assert (values[0][2] is None, values[1][2] is None) == (False, True)
