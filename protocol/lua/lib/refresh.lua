--- @include lib/chunks
--- @include lib/numbers
--- @include lib/time

-- What a living request has written does not expire while it runs, however long that takes.
local function refresh(id)
  for _, name in ipairs({ KEY.checkpoint, KEY.output, KEY.history }) do redis.call('EXPIRE', name .. id, DAY) end
  local seq, chunks = string.match(redis.call('HGET', KEY.checkpoint .. id, 'chunks') or '', ':(%d+):(%d+)$')
  -- Not at every checkpoint: there may be many, and they live for a day.
  if not seq or redis.call('TTL', chunk_name(id, seq, 1)) > DAY - HOUR then return end
  for number = 1, math.min(number_of(chunks), 65536) do redis.call('EXPIRE', chunk_name(id, seq, number), DAY) end
end
