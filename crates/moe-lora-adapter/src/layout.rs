//! Direct or transposed: the one question that a file of `target_parameters` leaves open.

use crate::ExpertLayout;
use crate::flat::Parameter;
use crate::load::Context;
use moe_lora_core::InputError;
use std::collections::BTreeMap;

/// Decides by the sizes of all parameters, as all were written under one rule; where all fit both ways (H = 2I or H = I
/// with one parameter), by the version that wrote the file, and else by the caller's option.
pub(crate) fn decide(
    cx: Context<'_>,
    layers: &BTreeMap<usize, Vec<Parameter<'_>>>,
) -> Result<ExpertLayout, InputError> {
    let all = || layers.iter().flat_map(|(n, parameters)| parameters.iter().map(move |p| (*n, p)));
    let fits = |p: &Parameter<'_>, layout| {
        let [out, inner] = p.target.base_shape(&cx.shape.layer);
        (p.width, p.height) == if layout == ExpertLayout::Direct { (inner, out) } else { (out, inner) }
    };
    let misfit = |layout| all().find(|(_, p)| !fits(p, layout));
    let (layer, parameter, expected) = match (misfit(ExpertLayout::Direct), misfit(ExpertLayout::Transposed)) {
        (None, Some(_)) => return Ok(ExpertLayout::Direct),
        (Some(_), None) => return Ok(ExpertLayout::Transposed),
        (Some((n, p)), Some(_)) => (n, p, "the orientation of the other parameters of the file"),
        (None, None) => {
            let version = cx.config.peft_version.as_deref();
            let known = version.and_then(|v| by_version(v, cx.shape.storage.transposed));
            match (known.or(cx.options.expert_layout), all().next()) {
                (Some(layout), _) => return Ok(layout),
                (None, Some((n, p))) => (
                    n,
                    p,
                    "sizes or a peft_version that tell whether A is [rank, in] or [rank, out], or the option expert_layout",
                ),
                (None, None) => return Ok(ExpertLayout::Direct),
            }
        }
    };
    let version = cx.config.peft_version.as_deref().map_or(String::new(), |v| format!(", peft_version {v}"));
    let cx = Context { layer, ..cx };
    let found =
        format!("{}: A {:?}, B {:?}{version}", cx.place(parameter.target, None), parameter.a.shape, parameter.b.shape);
    Err(InputError::new(found, expected).in_tensor(&*parameter.a.name))
}

/// What PEFT wrote, where its version and the order of the base's dimensions settle it. With `[E, in, out]` storage the
/// later versions also asked the model's code for a flag that the file does not carry.
fn by_version(version: &str, stored_in_out: bool) -> Option<ExpertLayout> {
    // Versions under development ("0.19.1.dev0") lie between two releases.
    let numbers: Vec<u32> = version.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
    match (<[u32; 3]>::try_from(numbers).ok()?, stored_in_out) {
        ([0, 17, _] | [0, 18, 0..=1], true) => Some(ExpertLayout::Direct),
        ([0, 17, _] | [0, 18, 0..=1] | [0, 19, 0], false) => Some(ExpertLayout::Transposed),
        ([0, 19, 1..=u32::MAX] | [0, 20, _] | [0, 21, 0..=2], false) => Some(ExpertLayout::Direct),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        use ExpertLayout::{Direct, Transposed};
        for (version, stored_in_out, layout) in [
            ("0.17.0", false, Some(Transposed)),
            ("0.18.1", true, Some(Direct)),
            ("0.19.0", false, Some(Transposed)),
            ("0.19.0", true, None),
            ("0.19.1", false, Some(Direct)),
            ("0.21.2", false, Some(Direct)),
            ("0.21.2", true, None),
            ("0.19.1.dev0@abc", false, None),
            ("0.99.0", false, None),
            ("0.16.0", false, None),
            ("", false, None),
        ] {
            assert_eq!(by_version(version, stored_in_out), layout, "{version}");
        }
    }
}
