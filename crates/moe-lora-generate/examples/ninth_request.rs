//! How long a request with a new adapter holds up those that run: `ninth_request MODEL ADAPTER NEW_ADAPTER`.
//!
//! Eight requests on ADAPTER generate; a ninth on NEW_ADAPTER joins. Prints the median step before, the longest step while
//! the new adapter is read, and the step that reads the ninth prompt beside the prompt's own time.
#![allow(clippy::print_stdout, reason = "an example speaks")]

use moe_lora_generate::{Engine, Event, Options, Prompt, Request};
use std::time::{Duration, Instant};

const PROMPT: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, old, new] = args.as_slice() else { return Err("MODEL ADAPTER NEW_ADAPTER".into()) };
    let mut engine = Engine::open(model, Options::default(), |_, _| ())?;
    engine.register("old", old);
    engine.register("new", new);
    let prompt = |seed: u32| Prompt::Tokens((0..PROMPT as u32).map(|i| (seed * 7919 + i * 104_729) % 32_000).collect());
    let request = |seed, adapter| Request { max_tokens: 200, ..Request::new(prompt(seed), Some(adapter)) };

    // The prompt's own time, with a warm model.
    let mut alone = Duration::MAX;
    for seed in 0..3 {
        engine.submit(Request { max_tokens: 1, ..request(seed, "old") });
        while !engine.is_idle() {
            alone = alone.min(timed(&mut engine)?.0);
        }
    }
    (0..8).for_each(|seed| _ = engine.submit(request(seed, "old")));
    while engine.statistics().new_tokens < 8 * 20 {
        timed(&mut engine)?;
    }
    let mut before =
        (0..20).map(|_| Ok(timed(&mut engine)?.0)).collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
    before.sort();
    let median = before[before.len() / 2];
    let ninth = engine.submit(request(100, "new"));
    let mut during = Duration::ZERO;
    let mut steps = 0;
    let joined = loop {
        let (took, events) = timed(&mut engine)?;
        if events.iter().any(|e| matches!(e, Event::Token { id, .. } if *id == ninth)) {
            break took;
        }
        during = during.max(took);
        steps += 1;
    };
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    println!("step of 8 texts, median     {:8.1} ms", ms(median));
    println!("longest while it was read   {:8.1} ms of {steps} steps", ms(during));
    println!("the step that it joined     {:8.1} ms", ms(joined));
    println!("a prompt of {PROMPT} by itself     {:8.1} ms", ms(alone));
    let stall = joined.max(during).saturating_sub(median);
    println!("stall                       {:8.1} ms; allowed: less than {:.1} ms", ms(stall), ms(median + alone));
    Ok(())
}

/// A step with at least one running text, or the wait for an adapter.
fn timed(engine: &mut Engine) -> Result<(Duration, Vec<Event>), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let events = engine.step()?;
    Ok((start.elapsed(), events))
}
