//! Small files, good and bad, from which mutations start. Names begin with `ok` or `bad`.

use super::{Array, File, Pair, Sizes, W, flat, fused, per_expert, random, stacked};
use super::{PROJ, input::join};
use moe_lora_core::{DType, Projection};
use serde_json::json;

const SIZES: [Sizes; 3] = [Sizes { e: 4, h: 8, i: 6 }, Sizes { e: 4, h: 8, i: 4 }, Sizes { e: 4, h: 8, i: 8 }];

/// Name and bytes of every seed.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut add = |name: &str, model: u8, file: &File| {
        all.push((name.to_owned(), join(model, &file.config_bytes(), &file.bytes())));
    };
    let rng = &mut fastrand::Rng::with_seed(7);
    for (model, sizes) in SIZES.into_iter().enumerate() {
        let pairs = random(rng, sizes, 1, 2, 2.0, true);
        let gate_up_down = fused(&pairs, model == 1);
        let model = model as u8;
        let of = |n: usize| gate_up_down.values().map(|pair| &pair[n]).collect::<Vec<&Pair>>();
        let separate = |p| (0..sizes.e).map(|e| &pairs[&(0, e, p)]).collect::<Vec<&Pair>>();

        let mut file = File::new(2, 4.0);
        per_expert(&mut file, &pairs, "mlp", PROJ);
        file.put(0, "self_attn.q_proj.lora_A.weight", Array::random(rng, [2, 8]));
        add(&format!("ok-per-expert-{model}"), model, &file.clone().dtype(DType::Bf16));
        file.remove("experts.1.up_proj.lora_B.weight");
        add(&format!("bad-one-sided-{model}"), model, &file);

        let mut file = File::new(9, 9.0)
            .set("rank_pattern", json!({r".*\.w\d": 2}))
            .set("alpha_pattern", json!({"w1": 4, "w2": 4, "experts.0.w3": 4, "w3": 4}));
        per_expert(&mut file, &pairs, "block_sparse_moe", W);
        add(&format!("ok-mixtral-{model}"), model, &file.dtype(DType::F16));

        for rank_last in [false, true] {
            let mut file = File::new(2, 4.0);
            stacked(&mut file, 0, "mlp.experts.gate_up_proj", &of(0), rank_last);
            stacked(&mut file, 0, "mlp.experts.down_proj", &of(1), rank_last);
            add(&format!("ok-stacked-{rank_last}-{model}"), model, &file.clone().dtype(DType::Bf16));
            file.tensors[0].2.values[3] = f32::NAN;
            add(&format!("bad-nan-{rank_last}-{model}"), model, &file);
        }
        let mut file = File::new(2, 4.0);
        for p in Projection::ALL {
            stacked(&mut file, 1, &format!("block_sparse_moe.{}", W[p as usize]), &separate(p), true);
        }
        add(&format!("ok-on-block-{model}"), model, &file);

        for transposed in [false, true] {
            let mut file = File::new(2, 4.0).set("target_parameters", json!(["experts.gate_up_proj", "down_proj"]));
            flat(&mut file, 0, "mlp.experts.base_layer", &of(0), transposed);
            flat(&mut file, 0, "mlp.experts", &of(1), transposed);
            add(&format!("ok-flat-{transposed}-{model}"), model, &file.dtype(DType::Bf16));
        }
        let mut file = File::new(2, 4.0).set("target_parameters", json!(["gate_proj", "up_proj", "down_proj"]));
        for (p, depth) in Projection::ALL.into_iter().zip([".base_layer.base_layer", ".base_layer", ""]) {
            flat(&mut file, 0, &format!("mlp.experts{depth}"), &separate(p), false);
        }
        add(&format!("{}-flat-separate-{model}", if model == 2 { "bad" } else { "ok" }), model, &file);
    }
    let mut empty = File::new(8, 16.0).set("use_dora", json!(false));
    add("ok-empty", 0, &empty);
    empty.put(0, "mlp.experts.0.up_proj.lora_A.weight", Array { shape: vec![0], values: vec![] });
    add("ok-placeholder", 1, &empty);
    add("bad-dora", 0, &empty.set("use_dora", json!(true)));
    all
}
