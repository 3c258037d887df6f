-- What llama.vim and minuet do in a real Neovim, byte for byte on the wire: lay the text around the cursor out, ask with
-- curl, read the reply as each of them reads it, put the text at the cursor.
-- Run: LORRY_URL=http://… nvim --clean --headless -l neovim_completions.lua llama.vim|minuet

local url = vim.env.LORRY_URL
local lines = { "def add(a, b):", "    return ", "", "print(add(1, 2))" }
vim.api.nvim_buf_set_lines(0, 0, -1, false, lines)
local row, column = 2, #lines[2]

local function curl(arguments, path, body)
  local file = vim.fn.tempname()
  vim.fn.writefile({ vim.json.encode(body) }, file, "b")
  local command = vim.list_extend({ "curl" }, arguments)
  vim.list_extend(command, { "--header", "Content-Type: application/json", "--data", "@" .. file, url .. path })
  return vim.system(command, { text = true }):wait(60000).stdout
end

local function before()
  return table.concat(vim.list_slice(lines, 1, row - 1), "\n") .. "\n"
end

local function after()
  return lines[row]:sub(column + 1) .. "\n" .. table.concat(vim.list_slice(lines, row + 1), "\n") .. "\n"
end

local clients = {}

clients["llama.vim"] = function()
  local timings = {}
  for _, part in ipairs({ "prompt", "predicted" }) do
    for _, name in ipairs({ "n", "ms", "per_token_ms", "per_second" }) do
      timings[#timings + 1] = ("timings/%s_%s"):format(part, name)
    end
  end
  local raw = curl({ "--silent", "--no-buffer" }, "/infill", {
    id_slot = 0, input_prefix = before(), input_suffix = after(), prompt = lines[row]:sub(1, column),
    input_extra = { { text = "def sub(a, b):\n    return a - b\n", time = 0, filename = "sub.py" } },
    n_predict = 128, stop = {}, n_indent = 4, top_k = 40, top_p = 0.90,
    samplers = { "top_k", "top_p", "infill" }, stream = false, cache_prompt = true,
    t_max_prompt_ms = 500, t_max_predict_ms = 1000,
    response_fields = vim.list_extend({ "content", "truncated", "tokens_cached" }, timings),
  })
  -- Replies that do not look like this are dropped without a word.
  assert(raw:match("^%s*{") and raw:match('"content"%s*:"'), raw)
  local reply = vim.json.decode(raw)
  for _, name in ipairs(timings) do
    assert(type(reply[name]) == "number", name .. " is missing in " .. raw)
  end
  return reply.content
end

clients.minuet = function()
  local raw = curl({ "-L", "--max-time", "30", "--header", "Accept: application/json" }, "/v1/completions", {
    model = "qwen2.5-coder:0.5b", stream = true, prompt = before() .. lines[row]:sub(1, column), suffix = after(),
    max_tokens = 32, top_p = 0.9, stop = { "\n\n" },
  })
  local text = ""
  for line in vim.gsplit(raw, "\n", { trimempty = true }) do
    local data = line:match("^data: (.*)$")
    if data and data ~= "[DONE]" then
      text = text .. vim.json.decode(data).choices[1].text
    end
  end
  return text
end

local text = vim.split(clients[arg[1]](), "\n")
vim.api.nvim_buf_set_text(0, row - 1, column, row - 1, column, text)
io.write(table.concat(vim.api.nvim_buf_get_lines(0, 0, -1, false), "\n"), "\n")
