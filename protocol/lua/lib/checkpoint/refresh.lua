--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/chunks

-- Give what a running request has stored its full day again: nothing of it expires while it runs.
local function refresh(id)
  for _, name in ipairs({ KEY.checkpoint, KEY.output, KEY.history }) do redis.call('EXPIRE', name .. id, DAY) end
  local seq, chunks = string.match(redis.call('HGET', KEY.checkpoint .. id, 'chunks') or '', ':(%d+):(%d+)$')
  -- There may be many chunks: once an hour is enough.
  if not seq or redis.call('TTL', chunk_name(id, seq, 1)) > DAY - HOUR then return end
  for number = 1, math.min(number_of(chunks), 65536) do redis.call('EXPIRE', chunk_name(id, seq, number), DAY) end
end
