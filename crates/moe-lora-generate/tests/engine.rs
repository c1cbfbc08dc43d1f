//! Requests that come and go: the tokens of transformers and PEFT, whatever happens beside them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

mod common;

use common::{ADAPTERS, FAMILIES, Golden, adapter_dir, folder, golden};
use moe_lora::PoolConfig;
use moe_lora_generate::{
    Completion, Engine, Event, Finish, Options, Prompt, Request, RequestError, RequestId, Sampling,
};
use std::collections::{HashMap, HashSet};
use std::path::Path;

fn engine(family: &str, options: Options) -> Engine {
    let mut layers = Vec::new();
    let mut engine = Engine::open(folder().join(family), options, |done, all| layers.push((done, all))).unwrap();
    let all = engine.decoder().config().num_hidden_layers;
    assert_eq!(layers, (0..=all).map(|n| (n, all)).collect::<Vec<_>>());
    for name in ADAPTERS {
        engine.register(name, adapter_dir(family, name));
    }
    engine
}

fn request(golden: &Golden) -> Request {
    let prompt = Prompt::Text(golden.prompt.clone());
    Request { max_tokens: 12, ..Request::new(prompt, golden.adapter.as_deref()) }
}

/// What came of each request; the streamed text must be the whole text.
#[derive(Default)]
struct Results {
    done: HashMap<RequestId, Completion>,
    failed: HashMap<RequestId, RequestError>,
    text: HashMap<RequestId, String>,
    tokens: HashMap<RequestId, Vec<u32>>,
    loaded: Vec<String>,
}

impl Results {
    fn take(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Token { id, token, text } => {
                    self.text.entry(id).or_default().push_str(&text);
                    self.tokens.entry(id).or_default().push(token);
                }
                Event::Finished { id, rest, completion } => {
                    assert_eq!(self.text.remove(&id).unwrap() + &rest, completion.text);
                    assert_eq!(self.tokens[&id], completion.tokens);
                    assert!(self.done.insert(id, completion).is_none());
                }
                Event::Failed { id, error } => assert!(self.failed.insert(id, error).is_none()),
                Event::Loaded { adapter, bytes, warnings } => {
                    assert!(bytes[0] + bytes[1] > 0 && warnings.len() <= 1, "{warnings:?}");
                    self.loaded.push(adapter);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn run(&mut self, engine: &mut Engine) {
        while !engine.is_idle() {
            self.take(engine.step().unwrap());
        }
    }

    fn check(&self, id: RequestId, golden: &Golden) {
        let done = &self.done[&id];
        assert_eq!(done.tokens, golden.tokens, "{:?} with {:?}", golden.prompt, golden.adapter);
        assert_eq!((&done.text, done.prompt_tokens), (&golden.text, golden.prompt_tokens.len()));
        let ended = golden.tokens.last() == Some(&0);
        assert_eq!(done.finish, if ended { Finish::Stop } else { Finish::Length });
    }
}

fn options(max_batch: usize, max_step_tokens: usize) -> Options {
    Options { max_batch, max_step_tokens, ..Options::default() }
}

#[test]
fn mixed_batches_give_the_tokens_of_transformers_and_peft() {
    for family in FAMILIES {
        let all = golden(family);
        // All at once; short steps that cut prompts; few at a time; one after the other.
        for (max_batch, max_step_tokens) in [(64, 256), (64, 16), (3, 7), (1, 256)] {
            let mut engine = engine(family, options(max_batch, max_step_tokens));
            let mut results = Results::default();
            let ids: Vec<_> = all.iter().map(|golden| engine.submit(request(golden))).collect();
            results.run(&mut engine);
            ids.iter().zip(&all).for_each(|(id, golden)| results.check(*id, golden));
            results.loaded.sort();
            let mut want = ADAPTERS.to_vec();
            want.sort_unstable();
            assert_eq!(results.loaded, want, "each adapter is read once");
            let statistics = engine.statistics();
            let count = |tokens: fn(&Golden) -> usize| all.iter().map(tokens).sum::<usize>() as u64;
            assert_eq!(statistics.new_tokens, count(|g| g.tokens.len()));
            assert_eq!(statistics.prompt_tokens, count(|g| g.prompt_tokens.len()));
            assert!(statistics.pool_bytes > 0 && statistics.linear_bytes > 0 && statistics.loads == 3);
        }
    }
}

#[test]
fn requests_join_while_others_generate() {
    let all = golden("qwen3_moe");
    let mut engine = engine("qwen3_moe", options(4, 16));
    let mut results = Results::default();
    let mut ids = Vec::new();
    for golden in &all {
        ids.push(engine.submit(request(golden)));
        results.take(engine.step().unwrap());
    }
    results.run(&mut engine);
    ids.iter().zip(&all).for_each(|(id, golden)| results.check(*id, golden));
}

#[test]
fn failures_leave_the_others_untouched() {
    for family in FAMILIES {
        let all = golden(family);
        let mut engine = engine(family, options(64, 32));
        let huge = tempfile::tempdir().unwrap();
        write_huge_adapter(&adapter_dir(family, "everything"), huge.path());
        engine.register("huge", huge.path());
        engine.register("nowhere", folder().join("nowhere"));
        let router = tempfile::tempdir().unwrap();
        write_router_adapter(&adapter_dir(family, "attention"), router.path());
        engine.register("router", router.path());

        let text = |text: &str, adapter| Request::new(Prompt::Text(text.into()), adapter);
        let tokens = |tokens: &[u32]| Request::new(Prompt::Tokens(tokens.to_vec()), None);
        let bad = [
            (text("A token", Some("nobody")), "adapter \"nobody\" is not known"),
            (text("A token", Some("nowhere")), "adapter \"nowhere\": "),
            (text("A token", Some("router")), "mlp.gate.lora_A.weight: found 2 tensors that change what is not"),
            (text("A token", Some("huge")), "left the range of f32"),
            (text(&"sacks ".repeat(60), None), "leaves no room in a model for 96"),
            (tokens(&[]), "an empty prompt"),
            (tokens(&[5, 320]), "token 320"),
            (Request { max_tokens: 0, ..tokens(&[5]) }, "max_tokens 0"),
        ];
        let mut ids = Vec::new();
        let mut failing = Vec::new();
        let mut bad = bad.into_iter();
        for golden in &all {
            failing.extend(bad.next().map(|(request, why)| (engine.submit(request), why)));
            ids.push(engine.submit(request(golden)));
        }
        assert!(bad.next().is_none());
        let mut results = Results::default();
        results.run(&mut engine);
        ids.iter().zip(&all).for_each(|(id, golden)| results.check(*id, golden));
        for (id, why) in failing {
            let error = results.failed.remove(&id).unwrap().to_string();
            assert!(error.contains(why), "{error:?}, not {why:?}");
            assert!(!error.contains('\n'));
        }
        assert!(results.failed.is_empty());
        assert!(engine.statistics().pool_bytes > 0);
    }
}

/// The adapter, its B matrices so large that numbers overflow.
fn write_huge_adapter(from: &Path, to: &Path) {
    let text = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["lora_alpha"] = 1e38.into();
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::copy(from.join("adapter_model.safetensors"), to.join("adapter_model.safetensors")).unwrap();
}

/// The adapter with q_proj renamed to the router.
fn write_router_adapter(from: &Path, to: &Path) {
    std::fs::copy(from.join("adapter_config.json"), to.join("adapter_config.json")).unwrap();
    let bytes = std::fs::read(from.join("adapter_model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let header = header.replace("layers.0.self_attn.q_proj.", "layers.0.mlp.gate.");
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.extend(&bytes[8 + length..]);
    std::fs::write(to.join("adapter_model.safetensors"), out).unwrap();
}

#[test]
fn adapters_that_do_not_fit_together_take_turns() {
    for family in FAMILIES {
        let all = golden(family);
        let sizes: Vec<usize> = ["experts", "everything"].map(|name| pool_bytes(family, name)).into();
        // Room for the larger one alone.
        let bytes = sizes[0].max(sizes[1]) + 8;
        let adapters = PoolConfig { bytes, ..PoolConfig::default() };
        let mut engine = engine(family, Options { adapters, ..Options::default() });
        let ids: Vec<_> = all.iter().map(|golden| engine.submit(request(golden))).collect();
        let mut results = Results::default();
        results.run(&mut engine);
        ids.iter().zip(&all).for_each(|(id, golden)| results.check(*id, golden));
        assert!(engine.statistics().evictions > 0);

        // No room for it ever: an error for its requests, not for others.
        let bytes = sizes[0].max(sizes[1]) - 8;
        let adapters = PoolConfig { bytes, ..PoolConfig::default() };
        let mut engine = engine_with(family, adapters);
        let larger = if sizes[0] > sizes[1] { "experts" } else { "everything" };
        let ids: Vec<_> = all.iter().map(|golden| engine.submit(request(golden))).collect();
        let mut results = Results::default();
        results.run(&mut engine);
        for (id, golden) in ids.iter().zip(&all) {
            if golden.adapter.as_deref() == Some(larger) {
                assert!(results.failed[id].to_string().contains("the pool's budget"), "{}", results.failed[id]);
            } else {
                results.check(*id, golden);
            }
        }
    }
}

fn engine_with(family: &str, adapters: PoolConfig) -> Engine {
    engine(family, Options { adapters, ..Options::default() })
}

fn pool_bytes(family: &str, adapter: &str) -> usize {
    let mut engine = engine(family, Options::default());
    engine.submit(Request { max_tokens: 1, ..Request::new(Prompt::Tokens(vec![5]), Some(adapter)) });
    Results::default().run(&mut engine);
    engine.statistics().pool_bytes
}

/// Eight texts run, and a ninth comes with an adapter that nobody has read yet: each of the eight gets a token at every step,
/// at the one that asks for the adapter, while it is read, and while the ninth prompt is, in pieces that fit beside them.
#[test]
fn a_new_adapter_costs_running_texts_no_step() {
    const STEP: usize = 24;
    let all = golden("qwen3_moe");
    let mut engine = engine("qwen3_moe", options(16, STEP));

    let mut running = HashSet::new();
    for golden in all.iter().cycle().take(8) {
        let first = Prompt::Tokens(golden.prompt_tokens[..2].to_vec());
        running.insert(engine.submit(Request { max_tokens: 90, ..Request::new(first, Some("experts")) }));
    }
    // All events of one step; the eight, as long as they run, each with one token.
    let step = |engine: &mut Engine, running: &mut HashSet<RequestId>| {
        let events = engine.step().unwrap();
        let mut served: Vec<_> = events
            .iter()
            .filter_map(|e| if let Event::Token { id, .. } = e { Some(*id) } else { None })
            .filter(|id| running.contains(id))
            .collect();
        served.sort_unstable();
        let ended =
            |id: &RequestId| events.iter().any(|e| matches!(e, Event::Finished { id: other, .. } if other == id));
        let mut want: Vec<_> = running.iter().copied().collect();
        want.sort_unstable();
        running.retain(|id| !ended(id));
        (events, served == want)
    };
    while !step(&mut engine, &mut running).1 {}
    let prompt = Prompt::Tokens((0..40).map(|i| 5 + 7 * i % 300).collect());
    let prompts = engine.statistics().prompt_tokens;
    let ninth = engine.submit(Request { max_tokens: 2, ..Request::new(prompt, Some("everything")) });
    // The step that asks for the adapter does not wait for it.
    let (events, served) = step(&mut engine, &mut running);
    assert!(served && !events.iter().any(|e| matches!(e, Event::Loaded { .. })));
    let texts = running.len();
    assert!(texts >= 4, "only {texts} of the eight still run");
    let mut pieces = 0;
    loop {
        let before = engine.statistics().prompt_tokens;
        let (events, served) = step(&mut engine, &mut running);
        assert!(served || running.is_empty());
        let read = engine.statistics().prompt_tokens - before;
        assert!(read <= (STEP - running.len().min(texts)) as u64, "{read} tokens of a prompt beside {texts} texts");
        pieces += u32::from(read > 0);
        if events.iter().any(|e| matches!(e, Event::Token { id, .. } if *id == ninth)) {
            break;
        }
    }
    assert_eq!(engine.statistics().prompt_tokens, prompts + 40);
    assert!((2..=3).contains(&pieces), "{pieces} pieces of a prompt of 40 tokens");
}

#[test]
fn caches_are_bounded_and_requests_wait_for_them() {
    let all = golden("olmoe");
    // 2 layers of keys and values, 2 heads of 8 numbers in f32, for 70 tokens: room for the longest request alone.
    let cache_bytes = 2 * 2 * 2 * 8 * 4 * 70;
    let mut engine = engine("olmoe", Options { cache_bytes, ..Options::default() });
    let ids: Vec<_> = all.iter().map(|golden| engine.submit(request(golden))).collect();
    let long = engine.submit(Request { max_tokens: 80, ..Request::new(Prompt::Tokens(vec![5]), None) });
    let mut results = Results::default();
    let mut most = 0;
    while !engine.is_idle() {
        results.take(engine.step().unwrap());
        most = most.max(engine.running());
    }
    ids.iter().zip(&all).for_each(|(id, golden)| results.check(*id, golden));
    assert!(results.failed[&long].to_string().contains("81 tokens"), "{}", results.failed[&long]);
    assert!(most < all.len() - 1, "{most} at once");
}

#[test]
fn texts_end_where_the_model_ends() {
    let mut engine = engine("olmoe", Options::default());
    let id = engine.submit(Request { max_tokens: 1000, ..Request::new(Prompt::Tokens(vec![5; 90]), None) });
    let mut results = Results::default();
    results.run(&mut engine);
    assert_eq!((results.done[&id].tokens.len(), results.done[&id].finish), (6, Finish::Length));
}

#[test]
fn seeds_decide_what_is_drawn() {
    let draw = |seeds: &[u64]| {
        let mut engine = engine("qwen3_moe", Options::default());
        let submit = |&seed: &u64| {
            let sampling = Sampling { temperature: 1.5, top_p: 0.9, seed };
            let base = Request::new(Prompt::Text("The river".into()), Some("experts"));
            engine.submit(Request { sampling, max_tokens: 10, ..base })
        };
        let ids: Vec<_> = seeds.iter().map(submit).collect();
        let mut results = Results::default();
        results.run(&mut engine);
        ids.iter().map(|id| results.done[id].tokens.clone()).collect::<Vec<_>>()
    };
    let all = draw(&[1, 2, 1, 3]);
    assert!(all[0] == all[2] && all[0] != all[1] && all[1] != all[3]);
    assert_eq!(draw(&[2]), [all[1].clone()]);
}
