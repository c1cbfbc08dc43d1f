//! The command as a user runs it: files in, files out, exit codes and one-line errors.
//!
//! `MOE_LORA_FIXTURES` and `MOE_LORA_BIN` name the fixtures and the program where the sources are not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

use moe_lora::reference::metrics::relative_error;
use moe_lora_files::SafetensorsFile;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn moe_lora(args: &[&str]) -> Output {
    let built = env!("CARGO_BIN_EXE_moe-lora");
    let program = std::env::var_os("MOE_LORA_BIN").unwrap_or_else(|| built.into());
    Command::new(program).args(args).output().unwrap()
}

fn fixtures() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-lora/tests/golden");
    std::env::var_os("MOE_LORA_FIXTURES").map_or(beside, PathBuf::from)
}

fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one error line of a run that must end with `code`.
#[track_caller]
fn refused(args: &[&str], code: i32) -> String {
    let output = moe_lora(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    let line = errors.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error line: {errors}"));
    assert_eq!(errors.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    line.to_owned()
}

fn f32s(file: &SafetensorsFile, name: &str) -> Vec<f64> {
    let bytes = file.read(file.get(name).unwrap()).unwrap();
    bytemuck::pod_collect_to_vec::<u8, f32>(&bytes).into_iter().map(f64::from).collect()
}

/// An input file with `tensors` of (name, dtype, shape, bytes).
fn write_input(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views: Vec<(&str, TensorView<'_>)> =
        tensors.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.clone(), b).unwrap())).collect();
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn bytes<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// `forward` on a golden case; its input is the case's own file less the expected tensors.
fn golden(case: &str, extra: &[&str]) -> (f64, Output) {
    let root = fixtures();
    let about: Value = serde_json::from_slice(&std::fs::read(root.join(format!("{case}.json"))).unwrap()).unwrap();
    let given = SafetensorsFile::open(root.join(format!("{case}.safetensors"))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let tensors: Vec<_> = ["hidden_states", "adapter_index"]
        .map(|name| {
            let info = given.get(name).unwrap();
            (name, info.dtype, info.shape.to_vec(), given.read(info).unwrap())
        })
        .into();
    write_input(&input, &tensors);
    let mut args = vec!["forward".to_owned(), "--model".into(), text(root.join(about["checkpoint"].as_str().unwrap()))];
    args.extend(["--layer".into(), about["layer"].to_string(), "--input".into(), text(&input)]);
    args.extend(["--output".into(), text(&output)]);
    for adapter in about["adapters"].as_array().unwrap() {
        let dir = text(root.join(adapter[1].as_str().unwrap()));
        args.extend(["--adapter".into(), format!("{}={dir}", adapter[0].as_str().unwrap())]);
    }
    args.extend(extra.iter().map(|&e| e.to_owned()));
    let run = moe_lora(&args.iter().map(String::as_str).collect::<Vec<_>>());
    stdout(&run);
    let out = SafetensorsFile::open(&output).unwrap();
    assert_eq!(
        out.tensors().iter().map(|t| &*t.name).collect::<Vec<_>>(),
        ["hidden_states", "topk_ids", "topk_weights"]
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left behind");
    (relative_error(&f32s(&out, "hidden_states"), &f32s(&given, "expected_hidden_states")), run)
}

#[test]
fn forward_computes_what_hugging_face_computes() {
    for (case, bound) in [
        ("case-mixtral", 1e-4),
        ("case-mixtral-sharded", 1e-4),
        ("case-qwen2_moe", 1e-4),
        ("case-qwen3_moe", 1e-4),
        ("case-olmoe", 1e-4),
        ("case-deepseek_v2", 1e-4),
        ("case-deepseek_v3", 1e-4),
        ("case-gpt_oss", 1e-4),
        ("case-qwen2_moe-f16", 5e-4),
        ("case-qwen3_moe-bf16", 3e-3),
        ("case-gpt_oss-bf16", 3e-3),
        ("case-deepseek_v3-bf16", 3e-3),
    ] {
        let (error, _) = golden(case, &["--device", "cpu"]);
        assert!(error <= bound, "{case}: {error:.1e}");
        let (error, _) = golden(case, &["--reference"]);
        assert!(error <= 1e-5, "{case}: the reference is off by {error:.1e}");
    }
}

#[test]
fn ranks_compute_what_hugging_face_computes() {
    for (case, bound) in [("case-mixtral", 1e-4), ("case-gpt_oss", 1e-4), ("case-deepseek_v3-bf16", 3e-3)] {
        for (tp, ep) in [("2", "1"), ("1", "2"), ("2", "2"), ("4", "1")] {
            let (error, run) = golden(case, &["--device", "cpu", "--tp", tp, "--ep", ep]);
            assert!(error <= bound, "{case} on {tp} x {ep}: {error:.1e}");
            let (error, _) = golden(case, &["--device", "cpu", "--tp", tp, "--ep", ep, "--fully-sharded"]);
            assert!(error <= bound, "{case} on {tp} x {ep}, fully sharded: {error:.1e}");
            let text = stdout(&run);
            assert!(text.contains(&format!("ranks (tp {tp}, ep {ep}) on cpu")), "{text}");
            assert!(String::from_utf8(run.stderr).unwrap().matches("outside the experts").count() <= 1, "said once");
        }
    }
}

#[test]
fn grids_that_do_not_fit_are_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let output = text(folder.path().join("out.safetensors"));
    let (model, input) =
        (text(fixtures().join("checkpoints/mixtral")), text(fixtures().join("case-mixtral.safetensors")));
    let forward = |extra: &[&str]| {
        let args = ["forward", "--model", &model, "--input", &input, "--output", &output, "--device", "cpu"];
        refused(&[&args[..], extra].concat(), 2)
    };
    assert!(forward(&["--ep", "1000"]).contains("experts, expected at least one for each of 1000 ranks"));
    assert!(forward(&["--tp", "5000"]).contains("intermediate size"));
    assert!(forward(&["--tp", "0"]).contains("0 tensor-parallel by 1 expert-parallel ranks"));
    assert!(forward(&["--tp", "2", "--reference"]).contains("cannot be used with"));
}

#[test]
fn keys_outside_the_experts_are_said_and_no_error() {
    let (_, run) = golden("case-mixtral", &[]);
    assert!(String::from_utf8(run.stderr).unwrap().contains("outside the experts"));
}

#[test]
fn given_experts_are_used_and_tokens_may_be_none() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (text(folder.path().join("in.safetensors")), text(folder.path().join("out.safetensors")));
    let model = text(fixtures().join("checkpoints/mixtral"));
    let about: Value = serde_json::from_slice(&std::fs::read(Path::new(&model).join("config.json")).unwrap()).unwrap();
    let (h, k) =
        (about["hidden_size"].as_u64().unwrap() as usize, about["num_experts_per_tok"].as_u64().unwrap() as usize);
    let ids: Vec<i32> = (0..2 * k as i32).map(|i| if i == 1 { -1 } else { i % 3 }).collect();
    let hidden: Vec<f32> = (0..2 * h).map(|i| (i as f32).sin()).collect();
    write_input(
        Path::new(&input),
        &[
            ("hidden_states", Dtype::F32, vec![2, h], bytes(&hidden)),
            ("topk_ids", Dtype::I32, vec![2, k], bytes(&ids)),
            ("topk_weights", Dtype::F32, vec![2, k], bytes(&vec![0.5_f32; 2 * k])),
        ],
    );
    stdout(&moe_lora(&["forward", "--model", &model, "--input", &input, "--output", &output]));
    let out = SafetensorsFile::open(&output).unwrap();
    assert_eq!(out.read(out.get("topk_ids").unwrap()).unwrap(), bytes(&ids));
    assert!(f32s(&out, "hidden_states").iter().any(|v| *v != 0.0));

    write_input(Path::new(&input), &[("hidden_states", Dtype::BF16, vec![0, h], Vec::new())]);
    stdout(&moe_lora(&["forward", "--model", &model, "--input", &input, "--output", &output]));
    assert_eq!(*SafetensorsFile::open(&output).unwrap().get("hidden_states").unwrap().shape, [0, h]);
}

#[test]
fn bad_input_ends_with_two_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (text(folder.path().join("in.safetensors")), text(folder.path().join("out.safetensors")));
    let model = text(fixtures().join("checkpoints/mixtral"));
    let config: Value = serde_json::from_slice(&std::fs::read(Path::new(&model).join("config.json")).unwrap()).unwrap();
    let (h, k) =
        (config["hidden_size"].as_u64().unwrap() as usize, config["num_experts_per_tok"].as_u64().unwrap() as usize);
    let forward = |extra: &[&str]| {
        let mut args = vec!["forward", "--model", &model, "--input", &input, "--output", &output];
        args.extend(extra);
        refused(&args, 2)
    };
    assert!(forward(&[]).contains("in.safetensors"), "a missing input");
    let hidden = || ("hidden_states", Dtype::F32, vec![2, h], bytes(&vec![0.5_f32; 2 * h]));
    let with = |tensor: (&'static str, Dtype, Vec<usize>, Vec<u8>)| {
        write_input(Path::new(&input), &[hidden(), tensor]);
        forward(&[])
    };
    assert!(with(("adapter_index", Dtype::I32, vec![2], bytes(&[0, -1]))).contains("adapter 0"));
    assert!(with(("adapter_index", Dtype::I32, vec![3], bytes(&[-1; 3]))).contains("adapter_index: found [3] I32"));
    assert!(with(("adapter_index", Dtype::I64, vec![2], bytes(&[-1_i64; 2]))).contains("I64"));
    assert!(with(("topk_ids", Dtype::I32, vec![2, k], bytes(&vec![0; 2 * k]))).contains("topk_weights"));
    assert!(with(("adaptor_index", Dtype::I32, vec![2], bytes(&[-1; 2]))).contains("adaptor_index: found an unknown"));
    write_input(
        Path::new(&input),
        &[
            hidden(),
            ("topk_ids", Dtype::I32, vec![2, k], bytes(&vec![99; 2 * k])),
            ("topk_weights", Dtype::F32, vec![2, k], bytes(&vec![0.5_f32; 2 * k])),
        ],
    );
    assert!(forward(&[]).contains("topk_ids: found expert 99"));
    write_input(Path::new(&input), &[("hidden_states", Dtype::F32, vec![2, h + 1], bytes(&vec![0.5_f32; 2 * h + 2]))]);
    assert!(forward(&[]).contains("hidden_states"));
    write_input(Path::new(&input), &[("hidden_states", Dtype::F32, vec![1, h], bytes(&vec![f32::NAN; h]))]);
    assert!(forward(&[]).contains("NaN"));
    write_input(Path::new(&input), &[hidden()]);
    assert!(forward(&["--layer", "99"]).contains("99"));
    assert!(forward(&["--adapter", "x=/nowhere"]).contains("/nowhere"));
    let adapter = text(fixtures().join("refused/dora"));
    assert!(forward(&["--adapter", &format!("x={adapter}")]).contains("use_dora"));
    assert!(forward(&["--adapter", &format!("x={adapter}"), "--adapter", &format!("x={adapter}")]).contains("twice"));
    assert!(!Path::new(&output).exists(), "a refused run must not leave an output");

    assert!(refused(&["inspect", "--model", "/nowhere"], 2).contains("/nowhere"));
    assert!(refused(&["inspect", "--adapter", &adapter], 2).contains("use_dora"));
    assert!(
        refused(&["forward", "--model", &model, "--input", &input, "--output", &output, "--adapter", "x"], 2)
            .contains("NAME=DIR")
    );
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures().join("checkpoints/mixtral").join(name), model.join(name)).unwrap();
    }
    let path = model.join("model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let tensor = file.get("model.layers.0.block_sparse_moe.experts.1.w2.weight").unwrap();
    let (h, i) = (tensor.shape[0], tensor.shape[1]);
    let mut bytes_on_disk = std::fs::read(&path).unwrap();
    let data = bytes_on_disk.len() - file.tensors().iter().map(|t| t.range.end).max().unwrap();
    let all = data + tensor.range.start..data + tensor.range.end;
    bytes_on_disk[all].copy_from_slice(&bytes(&vec![f32::NAN; h * i]));
    std::fs::write(&path, bytes_on_disk).unwrap();

    let (input, output) = (text(folder.path().join("in.safetensors")), text(folder.path().join("out.safetensors")));
    write_input(
        Path::new(&input),
        &[
            ("hidden_states", Dtype::F32, vec![1, h], bytes(&vec![0.5_f32; h])),
            ("topk_ids", Dtype::I32, vec![1, 2], bytes(&[1, 0])),
            ("topk_weights", Dtype::F32, vec![1, 2], bytes(&[0.5_f32; 2])),
        ],
    );
    let line = refused(&["forward", "--model", &text(&model), "--input", &input, "--output", &output], 2);
    assert!(line.contains("layer 0 expert 1 down: found NaN") && !Path::new(&output).exists(), "{line}");
}

#[test]
fn a_failed_run_ends_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let input = text(folder.path().join("in.safetensors"));
    let model = text(fixtures().join("checkpoints/mixtral"));
    let config: Value = serde_json::from_slice(&std::fs::read(Path::new(&model).join("config.json")).unwrap()).unwrap();
    let h = config["hidden_size"].as_u64().unwrap() as usize;
    write_input(Path::new(&input), &[("hidden_states", Dtype::F32, vec![1, h], bytes(&vec![0.5_f32; h]))]);
    let args = ["forward", "--model", &model, "--input", &input, "--output"];
    assert!(refused(&[&args[..], &["/nowhere/out.safetensors"]].concat(), 1).contains("/nowhere/out.safetensors"));
    assert!(refused(&[&args[..], &["out", "--device", "cuda:7"]].concat(), 1).contains("cuda:7"));
}

#[test]
fn inspect_says_what_things_are() {
    let model = text(fixtures().join("checkpoints/deepseek_v3"));
    assert!(stdout(&moe_lora(&["inspect", "--model", &model])).contains("selection bias"));
    let facts: Value = serde_json::from_str(&stdout(&moe_lora(&["inspect", "--model", &model, "--json"]))).unwrap();
    assert!(facts["experts"].as_u64().unwrap() > 1 && facts["moe_layers"].as_array().is_some(), "{facts}");
    let about: Value = serde_json::from_slice(&std::fs::read(fixtures().join("case-qwen2_moe.json")).unwrap()).unwrap();
    let model = text(fixtures().join(about["checkpoint"].as_str().unwrap()));
    let adapter = text(fixtures().join(about["adapters"][0][1].as_str().unwrap()));
    let facts = stdout(&moe_lora(&["inspect", "--adapter", &adapter, "--json"]));
    assert!(serde_json::from_str::<Value>(&facts).unwrap()["r"].as_u64().is_some(), "{facts}");
    let facts = stdout(&moe_lora(&["inspect", "--adapter", &adapter, "--model", &model, "--json"]));
    let bytes = serde_json::from_str::<Value>(&facts).unwrap()["pool_bytes"].as_u64().unwrap();
    assert!(bytes > 0, "{facts}");

    let twice = [format!("a={adapter}"), format!("b={adapter}")];
    let args = ["inspect", "--model", &model, "--pool", &twice[0], "--pool", &twice[1]];
    assert!(stdout(&moe_lora(&args)).contains("2 loaded, 0 evicted"));
    let dump: Value = serde_json::from_str(&stdout(&moe_lora(&[&args[..], &["--json"]].concat()))).unwrap();
    assert_eq!((dump["used_bytes"].as_u64(), dump["adapters"][1]["name"].as_str()), (Some(2 * bytes), Some("b")));
    assert!(
        refused(&args[..5].iter().map(|a| if *a == model { "/nowhere" } else { a }).collect::<Vec<_>>(), 2)
            .contains("/nowhere")
    );
    assert!(refused(&[&args[..], &["--adapter-memory", "0"]].concat(), 2).contains("PoolConfig::bytes: found 0"));
}

#[test]
fn devices_and_demo_run_anywhere() {
    assert!(stdout(&moe_lora(&["devices"])).starts_with("cpu"));
    let facts: Value = serde_json::from_str(&stdout(&moe_lora(&["devices", "--json"]))).unwrap();
    assert!(facts["cpu"]["cores"].as_u64().unwrap() > 0);
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path().join("demo"));
    let shown = stdout(&moe_lora(&["demo", "--dir", &dir]));
    assert!(shown.contains("math") && shown.contains("checked"), "{shown}");
    // What the demo wrote are real files.
    let adapter = format!("{dir}/adapters/code");
    stdout(&moe_lora(&["inspect", "--adapter", &adapter, "--model", &format!("{dir}/model")]));
    assert!(refused(&["demo", "--dir", &dir], 2).contains("exists"));
}
