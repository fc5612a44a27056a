"""In Ultralytics itself: models from YAML, training, resuming, checkpoints, fuse, ONNX."""

import pytest

pytestmark = pytest.mark.slow


def test_a_yaml_may_name_the_layer_after_register_alone(stage, tmp_path):
    stage("register", tmp_path)


def test_train_reopen_replace_predict_fuse_export(stage, tmp_path):
    for name in ("train", "reopen", "export"):
        stage(name, tmp_path)


def test_resume(stage, tmp_path):
    for name in ("stop", "resume"):
        stage(name, tmp_path)


def test_the_processes_of_ddp_register(stage, tmp_path):
    stage("ddp", tmp_path)
    # Without the schemas: torchvision's import is this environment's matter, not the file's.
    text = (tmp_path / "process.py").read_text()
    assert (
        "    from seaattn_kernels.integrations.ultralytics import register\n    register()\n"
        in text
    )
    compile(text, "process.py", "exec")


def test_a_checkpoint_of_an_edited_source(stage, tmp_path):
    stage("edited", tmp_path)


def test_the_example(stage, tmp_path):
    told = stage("example", tmp_path)
    assert "ONNX Runtime differs by" in told


def test_explain(stage, tmp_path):
    told = stage("explained", tmp_path)
    assert "DetectionModel: 2 of its" in told
    assert told.count("seaattn_kernels: ") == 2
    assert told.count("(already, a module of this") == 2
    assert "DetectionModel: none of its" in told
    assert "ResNet: none of its" in told
    assert "Model: 2 of its" in told
    assert "stride_conv" in told


def test_compiles_for_all_sizes(stage, tmp_path):
    stage("compiled", tmp_path)
