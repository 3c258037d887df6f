//! What clients are still to be told. It is said while the device computes the next step: to wake a client takes longer than
//! to plan, and the device would stand still for it.

use std::collections::HashMap;

use super::client::Client;
use super::request::Event;
use super::sequence::SequenceId;

/// In the order in which it came about.
#[derive(Default)]
pub(super) struct Outbox(Vec<(SequenceId, Event)>);

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn push(&mut self, id: SequenceId, event: Event) {
        self.0.push((id, event));
    }

    /// Says everything, and lets go of the clients whose sequences have ended. Who sees its last event sees its resources
    /// returned, so that the gauges must say so already.
    pub fn deliver(&mut self, clients: &mut HashMap<SequenceId, Client>) {
        for (id, event) in self.0.drain(..) {
            if matches!(event, Event::Finished(_) | Event::OutOfTime | Event::Failed(_) | Event::Stopped) {
                if let Some(client) = clients.remove(&id) {
                    drop(client.permit);
                    let _ = client.events.send(event);
                }
            } else if let Some(client) = clients.get(&id) {
                // One that has gone is removed before the next plan.
                let _ = client.events.send(event);
            }
        }
    }
}
