//! The pages that OpenAI's lists come in.

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use schemars::JsonSchema;
use serde::Serialize;

use crate::http::AppState;
use crate::http::error::ApiError;

/// What the query of a list says.
#[derive(Debug)]
pub struct ListQuery(Vec<(String, String)>);

impl FromRequestParts<AppState> for ListQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(pairs)) => Ok(Self(pairs)),
            Err(error) => Err(ApiError::malformed(format!("the query cannot be read: {error}"))),
        }
    }
}

impl ListQuery {
    /// The last of this name; an empty one is none.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut named = self.0.iter().rev().filter(|(known, value)| known == name && !value.is_empty());
        named.next().map(|(_, value)| value.as_str())
    }

    /// 400 where the query narrows a list by what is not looked at here.
    pub fn refuse(&self, prefix: &str) -> Result<(), ApiError> {
        match self.0.iter().find(|(name, _)| name.starts_with(prefix)) {
            Some((name, _)) => Err(ApiError::invalid(name, format!("`{name}` narrows no list here: leave it out"))),
            None => Ok(()),
        }
    }

    /// The part of `items`, in the order of the list, that is asked for: at most `limit`, behind the one that `after` names.
    pub fn page<T: Serialize + JsonSchema>(
        &self,
        items: Vec<T>,
        id: impl Fn(&T) -> &str,
        default_limit: usize,
        max_limit: usize,
    ) -> Result<Page<T>, ApiError> {
        let limit = match self.get("limit").map(str::parse) {
            None => default_limit,
            Some(Ok(limit)) if (1..=max_limit).contains(&limit) => limit,
            Some(_) => {
                return Err(ApiError::invalid("limit", format!("`limit` must be a number from 1 to {max_limit}")));
            }
        };
        let first = match self.get("after") {
            None => 0,
            Some(after) => match items.iter().position(|item| id(item) == after) {
                Some(index) => index + 1,
                None => return Err(ApiError::invalid("after", format!("`after`: there is no {after:?} in this list"))),
            },
        };
        let has_more = items.len() - first > limit;
        let data: Vec<T> = items.into_iter().skip(first).take(limit).collect();
        let id_of = |item: Option<&T>| item.map(|item| id(item).to_owned());
        Ok(Page { object: "list", first_id: id_of(data.first()), last_id: id_of(data.last()), has_more, data })
    }
}

/// A part of a list.
#[derive(Debug, JsonSchema, Serialize)]
pub struct Page<T> {
    object: &'static str,
    data: Vec<T>,
    has_more: bool,
    first_id: Option<String>,
    last_id: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(query: &[(&str, &str)]) -> Result<(Vec<String>, bool), ApiError> {
        let query = ListQuery(query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect());
        let items = ["a", "b", "c"].map(str::to_owned).to_vec();
        query.page(items, |item| item, 2, 3).map(|page| (page.data, page.has_more))
    }

    #[test]
    fn a_page_begins_behind_after_and_says_whether_there_is_more() {
        let of = |items: &[&str], has_more| Ok((items.iter().map(|item| (*item).to_owned()).collect(), has_more));
        assert_eq!(page(&[]), of(&["a", "b"], true));
        assert_eq!(page(&[("after", "a")]), of(&["b", "c"], false));
        assert_eq!(page(&[("after", "c"), ("limit", "1")]), of(&[], false));
        assert_eq!(page(&[("limit", "3"), ("after", "")]), of(&["a", "b", "c"], false));
        for (name, value) in [("limit", "0"), ("limit", "4"), ("limit", "x"), ("after", "d")] {
            assert_eq!(page(&[(name, value)]).unwrap_err().param(), Some(name), "{value}");
        }
    }
}
