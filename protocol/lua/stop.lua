-- Mark running requests as stopped: what RQ's stop commands ask of the worker that holds them.
--
-- ARGV incarnation  of the worker process
-- EACH request: id         request id
-- EACH request: execution  the caller's execution
--
-- Returns  per request 'cancel' (the caller ends it with `cancel`, which keeps the word) or 'lost'
--
-- In a step of its own before that cancel: should the worker be lost in between, whoever ends the request finds
-- the wish in its status. A cancel that came first keeps its own word.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/lease/owns
--- @include lib/lease/refuse

never_refused()

local incarnation = arg()
local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution = arg(), arg()
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'status', 'cancel', 'origin', 'started_at')
  if not owns(id, execution, job[1], job[5]) then
    answers[#answers + 1] = refuse(id, execution, incarnation, job[4] or nil)
  else
    if job[3] ~= '1' and job[2] ~= 'canceled' then redis.call('HSET', name, 'status', 'stopped') end
    answers[#answers + 1] = 'cancel'
  end
end
return answers
