//! `moe-lora generate` on whole tiny models, against what transformers and PEFT generated.
//!
//! `MOE_LORA_GENERATE_FIXTURES` and `MOE_LORA_BIN` name the fixtures and the program where the sources are not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-lora-generate/tests/golden");
    std::env::var_os("MOE_LORA_GENERATE_FIXTURES").map_or(beside, PathBuf::from)
}

fn generate(family: &str, adapters: &[&str], rest: &[&str]) -> Output {
    let built = env!("CARGO_BIN_EXE_moe-lora");
    let mut command = Command::new(std::env::var_os("MOE_LORA_BIN").unwrap_or_else(|| built.into()));
    command.args(["generate", "--device", "cpu", "--model"]).arg(golden().join(family));
    for name in adapters {
        let dir = golden().join("adapters").join(format!("{family}-{name}"));
        command.arg("--adapter").arg(format!("{name}={}", dir.display()));
    }
    command.args(rest).output().unwrap()
}

fn requests(family: &str) -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(golden().join(format!("{family}-requests.json"))).unwrap()).unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn prompts_are_answered_in_their_order() {
    for family in ["qwen3_moe", "olmoe"] {
        let some = &requests(family)[..4];
        let prompt = |r: &Value| {
            let prompt = r["prompt"].as_str().unwrap().to_owned();
            r["adapter"].as_str().map_or(prompt.clone(), |name| format!("{name}: {prompt}"))
        };
        let prompts: Vec<String> = some.iter().map(prompt).collect();
        let mut args = vec!["--max-tokens", "12"];
        prompts.iter().for_each(|prompt| args.extend(["--prompt", prompt]));
        let out = generate(family, &["experts", "everything", "attention"], &args);
        assert!(out.status.success(), "{}", text(&out.stderr));
        let want: Vec<String> = some
            .iter()
            .map(|r| {
                let name = r["adapter"].as_str().unwrap_or("base model");
                format!("[{name}] {}{}\n", r["prompt"].as_str().unwrap(), r["text"].as_str().unwrap())
            })
            .collect();
        assert_eq!(text(&out.stdout), want.join("\n"));
        let errors = text(&out.stderr);
        assert!(errors.contains("4 texts: ") && errors.contains("new tokens/s"), "{errors}");
        assert!(errors.contains("adapters: "), "{errors}");

        let alone = generate(family, &[], &["--max-tokens", "12", "--prompt", "A token"]);
        assert!(alone.status.success() && !text(&alone.stdout).contains('['), "{}", text(&alone.stderr));
    }
}

#[test]
fn a_file_of_requests_gives_a_file_of_results() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let golden = requests("olmoe");
    let mut lines: Vec<Value> = golden
        .iter()
        .enumerate()
        .map(
            |(i, r)| json!({ "id": format!("r{i}"), "prompt": r["prompt"], "adapter": r["adapter"], "max_tokens": 12 }),
        )
        .collect();
    lines.insert(2, json!({ "prompt": "x", "adapter": "nobody" }));
    lines.push(json!({ "prompt_tokens": golden[0]["prompt_tokens"], "adapter": golden[0]["adapter"] }));
    let whole: String = lines.iter().map(|l| format!("{l}\n")).collect();
    std::fs::write(&input, whole).unwrap();
    let files = ["--requests", input.to_str().unwrap(), "--output", output.to_str().unwrap(), "--max-tokens", "12"];
    let out = generate("olmoe", &["experts", "everything", "attention"], &files);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains(&format!("1 of {} requests failed", lines.len())), "{}", text(&out.stderr));
    assert!(out.stdout.is_empty());
    let text = std::fs::read_to_string(&output).unwrap();
    let results: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(results.len(), lines.len());
    let of = |id: Value| results.iter().find(|r| r["id"] == id).unwrap();
    for (i, want) in golden.iter().enumerate() {
        let found = of(json!(format!("r{i}")));
        for field in ["text", "tokens", "adapter"] {
            assert_eq!(found[field], want[field], "request {i}");
        }
    }
    assert_eq!(of(json!(2))["error"], "adapter \"nobody\" is not known");
    assert_eq!(of(json!(lines.len() - 1))["tokens"], golden[0]["tokens"]);
}

#[test]
fn bad_input_ends_with_2_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("in.jsonl");
    for (line, why) in [
        ("{\"prompt\": 5}", "line 1"),
        ("{\"prompt\": \"x\", \"adaptor\": \"math\"}", "adaptor"),
        ("{\"prompt\": \"x\", \"prompt_tokens\": [1]}", "expected prompt or prompt_tokens"),
        ("{}", "expected prompt or prompt_tokens"),
    ] {
        std::fs::write(&file, line).unwrap();
        let out = generate("olmoe", &[], &["--requests", file.to_str().unwrap()]);
        assert_eq!(out.status.code(), Some(2), "{line}");
        assert!(text(&out.stderr).contains(why), "{line}: {}", text(&out.stderr));
    }
    let out = generate("olmoe", &["experts", "experts"], &["--prompt", "x"]);
    assert_eq!(out.status.code(), Some(2));
    let out = generate("nowhere", &[], &["--prompt", "x"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("no such folder"), "{}", text(&out.stderr));
    assert_eq!(generate("olmoe", &[], &[]).status.code(), Some(2), "neither prompts nor requests");
}

#[test]
fn a_prompt_for_an_unknown_name_is_the_base_models_and_told() {
    let out = generate("olmoe", &["experts"], &["--max-tokens", "2", "--prompt", "expert: two"]);
    assert!(out.status.success());
    assert!(text(&out.stderr).contains("note: prompt 1 is for the base model"), "{}", text(&out.stderr));
}
