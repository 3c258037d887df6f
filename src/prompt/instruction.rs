//! An adapter's own prompt: Jinja over the one variable `instruction`, as the adapter was trained with it, such as
//! `### Instruction:\n{{ instruction }}\n\n### Response:\n`. White space is kept as it is.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, UndefinedBehavior, context};

use super::PromptError;

const NAME: &str = "prompt";

/// Refuses a template that has no place for the instruction, wants more than that, or is not Jinja.
pub fn check(template: &str) -> Result<(), PromptError> {
    let environment = compile(template)?;
    let mut variables = environment.get_template(NAME).map_err(invalid)?.undeclared_variables(false);
    if !variables.remove("instruction") {
        return Err(PromptError::Instruction("it does not use {{ instruction }}".to_string()));
    }
    match variables.iter().min() {
        Some(name) => Err(PromptError::Instruction(format!("it uses {name}, but only instruction is known"))),
        None => Ok(()),
    }
}

/// The prompt text.
pub fn render(template: &str, instruction: &str) -> Result<String, PromptError> {
    let environment = compile(template)?;
    environment.get_template(NAME).and_then(|template| template.render(context! { instruction })).map_err(invalid)
}

fn compile(template: &str) -> Result<Environment<'_>, PromptError> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(invalid)?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_template(NAME, template).map_err(invalid)?;
    Ok(environment)
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
