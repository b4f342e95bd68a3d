--- @include lib/basics/numbers

-- A state above 1 MiB is stored in chunks, a key each. Two fields of the checkpoint name them, as
-- `<execution>:<seq>:<chunks>`: `chunks` the committed ones, `writing` those that are being written. Whoever deletes a
-- checkpoint deletes both; all chunks have a TTL, in case a crash leaves some.
local function chunk_name(id, seq, number)
  return KEY.chunk .. id .. ':' .. seq .. ':' .. int(number)
end

-- Delete the chunks that one of these fields names, except chunk number `but` of the checkpoint `seq`.
local function drop_chunks(id, mark, seq, but)
  local old, chunks = string.match(mark or '', ':(%d+):(%d+)$')
  for number = 1, math.min(number_of(chunks), 65536) do
    if old ~= seq or number ~= tonumber(but) then redis.call('UNLINK', chunk_name(id, old, number)) end
  end
end

-- Call it before the checkpoint is deleted, which names the chunks.
local function drop_all_chunks(id)
  local marks = redis.call('HMGET', KEY.checkpoint .. id, 'chunks', 'writing')
  drop_chunks(id, marks[1])
  drop_chunks(id, marks[2])
end
