-- Write chunks of large states. They are nothing until a `progress` commits all of a state at once.
--
-- EACH chunk: id         request id
-- EACH chunk: execution  the caller's execution
-- EACH chunk: seq        number of the checkpoint that the state will be
-- EACH chunk: total      how many chunks the state has
-- EACH chunk: number     of this one, from 1
-- EACH chunk: data       its bytes
--
-- Returns  per chunk 'ok' or 'lost' (another execution holds the request, or none)
--
-- The checkpoint notes which chunks are being written, so that whatever drops it drops them too. Sent again, a
-- chunk is written again as it is; one that comes late, when its checkpoint or a later one is committed or on its
-- way, is 'ok' and changes nothing. No lease is renewed: that the courier sends says nothing about the engine.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/chunks
--- @include lib/lease/owns
--- @include lib/queue/forget

local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution, seq, total, number, data = arg(), arg(), arg(), arg(), arg(), arg()
  local job = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'started_at')
  if not owns(id, execution, job[1], job[3]) then
    forget(id)
    count('fenced', job[2] or '')
    answers[#answers + 1] = 'lost'
  else
    local name, mark = KEY.checkpoint .. id, table.concat({ execution, seq, total }, ':')
    local point = redis.call('HMGET', name, 'seq', 'writing')
    local writing = point[2] or ''
    local whose, after = string.match(writing, '^(.*):(%d+):%d+$')
    local late = tonumber(seq) <= number_of(point[1]) or (whose == execution and number_of(after) > tonumber(seq))
    if not late then
      -- The chunk first: at maxmemory it is refused, and then nothing has been changed.
      redis.call('SET', chunk_name(id, seq, number), data, 'EX', DAY)
      if writing ~= mark then
        redis.call('HSET', name, 'writing', mark)
        redis.call('EXPIRE', name, DAY)
        -- All of them, also those of this number: another execution wrote them.
        drop_chunks(id, writing, seq, number)
      end
    end
    answers[#answers + 1] = 'ok'
  end
end
return answers
