//! Several adapters as one: their ranks are stacked, each at its own strength.

use std::sync::Arc;

use kernels::low_rank::LowRank;
use sha2::{Digest, Sha256};

use super::canonical::{Adapter, AdapterWeights, Coverage, EmbeddingDelta, HeadDelta, Member, Method, SiteDelta};
use super::manifest::AdapterManifest;
use crate::hexadecimal::hexadecimal;

/// Why adapters cannot be combined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComposeError {
    #[error("adapter {name:?} ({method}) can be neither combined with others nor scaled: {reason}")]
    NotLowRank { name: String, method: Method, reason: &'static str },
    #[error("the strength of adapter {name:?} is not a finite number")]
    Strength { name: String },
    #[error("a composition needs at least one adapter")]
    Empty,
}

/// The sum of the members' deltas, each times its strength. Members are of one base; those of strength 0 have been left
/// out.
///
/// # Errors
/// When a member is more than low-rank pairs and added biases, or a strength is not finite.
pub fn compose(members: &[(Arc<Adapter>, f32)]) -> Result<Adapter, ComposeError> {
    for (member, strength) in members {
        check(member, *strength)?;
    }
    let (first, _) = members.first().ok_or(ComposeError::Empty)?;
    let site = |layer: usize, module: usize| {
        let sites =
            members.iter().filter_map(|(member, strength)| Some((member.weights.site(layer, module)?, *strength)));
        sum_of_sites(&sites.collect::<Vec<_>>())
    };
    let layers = |layers: &dyn Fn(&AdapterWeights) -> usize| {
        members.iter().map(|(member, _)| layers(&member.weights)).max().unwrap_or(0)
    };
    let num_modules = |layer: usize| layers(&|weights| weights.layers.get(layer).map_or(0, Vec::len));
    let heads = members.iter().filter_map(|(member, strength)| Some((member.weights.head_delta()?, *strength)));
    let embeddings =
        members.iter().filter_map(|(member, strength)| Some((member.weights.embedding.as_ref()?, *strength)));
    let names: Vec<String> = members.iter().map(|(member, strength)| format!("{}*{strength}", member.name)).collect();
    let named = members.iter().map(|(member, strength)| Member {
        name: member.name.clone(),
        generation: member.generation.clone(),
        scale: *strength,
    });
    let mut adapter = Adapter {
        members: named.collect(),
        name: names.join("+"),
        generation: generation(members),
        method: if members.len() == 1 { first.method } else { Method::Lora },
        weights: Arc::new(AdapterWeights {
            layers: (0..layers(&|weights| weights.layers.len()))
                .map(|layer| (0..num_modules(layer)).map(|module| site(layer, module)).collect())
                .collect(),
            embedding: sum_of_embeddings(&embeddings.collect::<Vec<_>>()),
            head: sum_of_sites(&heads.collect::<Vec<_>>()).map(HeadDelta::Delta),
            prelude: None,
        }),
        coverage: Coverage::default(),
        // What a member says about its prompts and stops holds for it alone.
        manifest: if members.len() == 1 { first.manifest.clone() } else { AdapterManifest::default() },
    };
    adapter.coverage = Coverage::of(&adapter);
    Ok(adapter)
}

fn check(member: &Adapter, strength: f32) -> Result<(), ComposeError> {
    let name = member.name.clone();
    if !strength.is_finite() {
        return Err(ComposeError::Strength { name });
    }
    let mut sites = member.weights.sites().chain(member.weights.head_delta());
    let reason = if member.weights.prelude.is_some() {
        "it puts virtual tokens before the sequence"
    } else if matches!(member.weights.head, Some(HeadDelta::Replaced(_))) {
        "it replaces the head"
    } else if sites.any(|site| site.input_scale.is_some() || site.output_scale.is_some()) {
        "it scales inputs or outputs"
    } else {
        return Ok(());
    };
    Err(ComposeError::NotLowRank { name, method: member.method, reason })
}

fn sum_of_sites(sites: &[(&SiteDelta, f32)]) -> Option<SiteDelta> {
    if sites.is_empty() {
        return None;
    }
    let pairs: Vec<LowRank> =
        sites.iter().filter_map(|(site, strength)| Some(site.low_rank.as_ref()?.scaled(*strength))).collect();
    let low_rank = match &pairs[..] {
        [] => None,
        [pair] => Some(pair.clone()),
        pairs => Some(LowRank::stack(&pairs.iter().collect::<Vec<_>>())),
    };
    let mut bias: Option<Vec<f32>> = None;
    for (added, strength) in sites.iter().filter_map(|(site, strength)| Some((site.bias.as_ref()?, strength))) {
        let bias = bias.get_or_insert_with(|| vec![0.0; added.len()]);
        bias.iter_mut().zip(added).for_each(|(sum, added)| *sum += strength * added);
    }
    Some(SiteDelta { low_rank, bias, ..SiteDelta::default() })
}

fn sum_of_embeddings(members: &[(&EmbeddingDelta, f32)]) -> Option<EmbeddingDelta> {
    let (first, _) = members.first()?;
    let vocab_size = first.a.len() / first.rank;
    let row = |token: usize| members.iter().flat_map(move |(delta, _)| &delta.a[token * delta.rank..][..delta.rank]);
    Some(EmbeddingDelta {
        rank: members.iter().map(|(delta, _)| delta.rank).sum(),
        a: (0..vocab_size).flat_map(row).copied().collect(),
        b: members.iter().flat_map(|(delta, strength)| delta.b.iter().map(move |value| strength * value)).collect(),
    })
}

/// The same members at the same strengths in the same order, and nothing else, are the same generation.
fn generation(members: &[(Arc<Adapter>, f32)]) -> String {
    let mut hasher = Sha256::new();
    for (member, strength) in members {
        hasher.update((member.generation.len() as u64).to_le_bytes());
        hasher.update(&member.generation);
        hasher.update(strength.to_bits().to_le_bytes());
    }
    hexadecimal(hasher)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use kernels::half_matrix::HalfMatrix;

    use super::*;
    use crate::adapter::canonical::Prelude;
    use crate::model::spec::Module;

    fn adapter(name: &str, site: SiteDelta) -> Adapter {
        let manifest = AdapterManifest { task: Some(name.into()), ..AdapterManifest::default() };
        let layers = vec![vec![Some(site)]];
        let weights = Arc::new(AdapterWeights { layers, ..AdapterWeights::default() });
        Adapter { name: name.into(), generation: format!("{name}0"), weights, manifest, ..Adapter::default() }
    }

    fn low_rank(rank: usize, bias: Option<Vec<f32>>) -> SiteDelta {
        let halves = |n: usize| vec![f16::ONE; n];
        let pair = LowRank::pack(rank, 8, 4, 1.0, &halves(rank * 8), &halves(4 * rank));
        SiteDelta { low_rank: Some(pair), bias, ..SiteDelta::default() }
    }

    fn members(members: Vec<(Adapter, f32)>) -> Vec<(Arc<Adapter>, f32)> {
        members.into_iter().map(|(adapter, strength)| (Arc::new(adapter), strength)).collect()
    }

    #[test]
    fn ranks_add_up_and_biases_are_weighted() {
        let a = adapter("a", low_rank(3, Some(vec![1.0; 4])));
        let b = adapter("b", low_rank(2, Some(vec![10.0; 4])));
        let c = adapter("c", low_rank(1, None));
        let sum = compose(&members(vec![(a, 0.5), (b, 2.0), (c, -1.0)])).unwrap();
        let site = sum.site(0, Module::QProj).unwrap();
        assert_eq!(site.low_rank.as_ref().unwrap().rank(), 6);
        assert_eq!(site.bias.as_deref(), Some([20.5; 4].as_slice()));
        assert!(sum.site(0, Module::KProj).is_none());
        assert_eq!((sum.coverage.num_sites, sum.coverage.max_rank), (1, 6));
        assert_eq!((sum.name.as_str(), &sum.manifest), ("a*0.5+b*2+c*-1", &AdapterManifest::default()));
    }

    #[test]
    fn members_strengths_and_their_order_are_the_generation() {
        let of = |parts: &[(&str, f32)]| {
            let parts = parts.iter().map(|(name, strength)| (adapter(name, low_rank(1, None)), *strength));
            compose(&members(parts.collect())).unwrap()
        };
        let generations = [
            of(&[("a", 0.5)]),
            of(&[("a", 0.25)]),
            of(&[("a", 0.5), ("b", 1.0)]),
            of(&[("b", 1.0), ("a", 0.5)]),
            of(&[("a", 1.0), ("b", 0.5)]),
            of(&[("ab", 1.0)]),
        ]
        .map(|sum| sum.generation);
        assert_eq!(of(&[("a", 0.5)]).generation, generations[0]);
        assert_eq!(generations.iter().collect::<std::collections::BTreeSet<_>>().len(), generations.len());
        assert_eq!(of(&[("a", 0.5)]).manifest.task.as_deref(), Some("a"));
    }

    #[test]
    fn what_is_more_than_low_rank_is_refused_with_its_name_and_method() {
        let scaled = |method| {
            let site = SiteDelta { output_scale: Some(vec![1.0; 4]), ..low_rank(1, None) };
            Adapter { method, ..adapter("odd", site) }
        };
        let inputs = SiteDelta { input_scale: Some(vec![1.0; 8]), ..SiteDelta::default() };
        let plain = || adapter("odd", low_rank(1, None));
        let prelude = Some(Prelude::Embeddings { num_tokens: 1, rows: vec![0.0; 8] });
        let with_prelude = Arc::new(AdapterWeights { prelude, ..AdapterWeights::default() });
        let head = Some(HeadDelta::Replaced(HalfMatrix::pack(1, 8, &[f16::ONE; 8])));
        let with_head = Arc::new(AdapterWeights { head, ..AdapterWeights::default() });
        for (odd, words) in [
            (scaled(Method::Dora), "(dora)"),
            (Adapter { method: Method::Ia3, ..adapter("odd", inputs) }, "(ia3)"),
            (Adapter { method: Method::PTuning, weights: with_prelude, ..plain() }, "(p-tuning)"),
            (Adapter { weights: with_head, ..plain() }, "replaces the head"),
        ] {
            let good = adapter("good", low_rank(1, None));
            let refusal = compose(&members(vec![(good, 1.0), (odd, 0.5)])).unwrap_err().to_string();
            assert!(refusal.contains("\"odd\"") && refusal.contains(words), "{refusal}");
        }
        assert_eq!(compose(&[]).unwrap_err(), ComposeError::Empty);
        let refusal = compose(&members(vec![(plain(), f32::NAN)])).unwrap_err();
        assert!(refusal.to_string().contains("odd"));
    }
}
