//! The arms of comparisons that are still writing. They are recorded at their end, and users vote before.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names of arms by the id of their comparison.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<HashMap<String, Vec<String>>>);

/// An arm, until this is dropped.
#[derive(Debug)]
pub struct ArmUnderWay {
    all: Arc<UnderWay>,
    id: String,
    arm: String,
}

impl UnderWay {
    pub fn begin(self: &Arc<Self>, id: &str, arm: &str) -> ArmUnderWay {
        self.lock().entry(id.to_owned()).or_default().push(arm.to_owned());
        ArmUnderWay { all: self.clone(), id: id.to_owned(), arm: arm.to_owned() }
    }

    pub fn arms_of(&self, id: &str) -> Vec<String> {
        self.lock().get(id).cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ArmUnderWay {
    fn drop(&mut self) {
        if let Entry::Occupied(mut arms) = self.all.lock().entry(std::mem::take(&mut self.id)) {
            arms.get_mut().retain(|arm| *arm != self.arm);
            if arms.get().is_empty() {
                arms.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arm_is_under_way_until_it_is_dropped_and_a_comparison_until_its_last_is() {
        let all = Arc::new(UnderWay::default());
        let [a, b, other] = [("1", "a"), ("1", "b"), ("2", "a")].map(|(id, arm)| all.begin(id, arm));
        assert_eq!((all.arms_of("1"), all.arms_of("2")), (vec!["a".to_owned(), "b".to_owned()], vec!["a".to_owned()]));
        drop(a);
        assert_eq!((all.arms_of("1"), all.arms_of("3")), (vec!["b".to_owned()], Vec::new()));
        drop((b, other));
        assert!(all.lock().is_empty());
    }
}
