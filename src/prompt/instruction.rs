//! An adapter's own prompt: Jinja over the one variable `instruction`, as the adapter was trained with it, such as
//! `### Instruction:\n{{ instruction }}\n\n### Response:\n`. White space is kept as it is.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, UndefinedBehavior, context};

use super::PromptError;

pub(super) const NAME: &str = "prompt";

/// Refuses a template that has no place for the instruction, wants more than that, or is not Jinja.
pub fn check(template: &str) -> Result<(), PromptError> {
    let environment = compile(template).map_err(invalid)?;
    check_variables(&environment, &["instruction"]).map_err(PromptError::Instruction)
}

/// The prompt text.
pub fn render(template: &str, instruction: &str) -> Result<String, PromptError> {
    let environment = compile(template).map_err(invalid)?;
    environment.get_template(NAME).and_then(|template| template.render(context! { instruction })).map_err(invalid)
}

/// An environment with this one template, called [`NAME`].
pub(super) fn compile(template: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_template_owned(NAME, template.to_owned())?;
    Ok(environment)
}

/// Whether the template uses the first of `known`, and nothing but them.
pub(super) fn check_variables(environment: &Environment<'_>, known: &[&str]) -> Result<(), String> {
    let template = environment.get_template(NAME).map_err(|error| error.to_string())?;
    let used = template.undeclared_variables(false);
    if let Some(required) = known.first().filter(|name| !used.contains(**name)) {
        return Err(format!("it does not use {{{{ {required} }}}}"));
    }
    match used.iter().filter(|name| !known.contains(&name.as_str())).min() {
        Some(name) => Err(format!("it uses {name}, but knows only {}", known.join(" and "))),
        None => Ok(()),
    }
}

fn invalid(error: Error) -> PromptError {
    PromptError::Instruction(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALPACA: &str = "### Instruction:\n{{ instruction }}\n\n### Response:\n";

    fn refusal(template: &str) -> String {
        check(template).expect_err("the template is refused").to_string()
    }

    #[test]
    fn white_space_around_the_instruction_is_kept() {
        assert!(check(ALPACA).is_ok());
        assert_eq!(render(ALPACA, "sum `xs` <b>").unwrap(), "### Instruction:\nsum `xs` <b>\n\n### Response:\n");
    }

    #[test]
    fn a_template_without_the_instruction_is_refused() {
        assert!(refusal("### Response:").contains("{{ instruction }}"));
    }

    #[test]
    fn an_unknown_variable_is_refused_by_name() {
        assert!(refusal("{{ instruction }}{{ schema }}").contains("schema"));
    }

    #[test]
    fn broken_syntax_is_refused() {
        assert!(refusal("{{ instruction").contains("cannot be used"));
    }
}
